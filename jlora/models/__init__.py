"""Language models: a Hugging Face folder read as a configuration, params and a pure function of them."""
