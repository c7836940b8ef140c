"""What a user of PEFT runs to merge: python peft_merge.py CHECKPOINT ADAPTER OUT."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

checkpoint, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="500MB")
