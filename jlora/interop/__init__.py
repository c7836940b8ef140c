"""Files and trees of other libraries.

`jlora.interop.peft` is for Hugging Face PEFT, `jlora.interop.tunix` for the params trees of its models,
`jlora.interop.gemma` and `jlora.interop.qwix` for the LoRA params of these.
"""
