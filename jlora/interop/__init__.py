"""Files and trees of other libraries.

`jlora.interop.peft` is for Hugging Face PEFT, `jlora.interop.tunix` for the params trees of its models, and
`jlora.interop.names` for the LoRA parameters of gemma and qwix.
"""
