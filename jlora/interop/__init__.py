"""Files of other libraries: `jlora.interop.peft` for Hugging Face PEFT, `jlora.interop.tunix` for its model trees."""
