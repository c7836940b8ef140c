"""Files and trees of other libraries.

`jlora.interop.peft` is for Hugging Face PEFT, `jlora.interop.tunix` for the params trees of its models,
`jlora.interop.gemma`, `jlora.interop.qwix`, `jlora.interop.openpi` and `jlora.interop.maxtext` for the LoRA params of
these, `jlora.interop.mlx`, `jlora.interop.diffusion` and `jlora.interop.gguf` for the files of mlx-lm, of diffusion
models and of llama.cpp. `jlora.interop.engines` has what PEFT, vLLM and SGLang take of PEFT's files.
"""
