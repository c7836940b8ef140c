"""What a job on a language model writes, as PEFT loads it on the model of transformers: the same logits."""

import numpy as np
import pytest
from rich.console import Console

from jlora.recipes import JobConfig, load_run, run_job
from tests.recipes.tiny_language import VOCABULARY, sections, write_examples, write_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.interop.models import llama  # noqa: E402


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("head", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_peft_gives_the_logits_of_the_run(tmp_path, head):
    torch.manual_seed(0)
    base = llama(vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    write_examples(tmp_path / "train.jsonl", 20)
    write_examples(tmp_path / "eval.jsonl", 5, first=20)
    targets = ["model/layers/**/*_proj", *(["model/embed_tokens", "lm_head"] if head else [])]
    lora = {"target_modules": targets, "rank": 3, "alpha": 12.0}
    job = sections(
        tmp_path / "model", tmp_path, tmp_path / "run", lora=lora, generate={"prompts": [], "exact_match": 0}
    )
    run_job(JobConfig.from_dict(job), console=Console(quiet=True))

    tokens = np.random.default_rng(3).integers(3, VOCABULARY, (2, 7))
    ours = load_run(tmp_path / "run").model({"tokens": tokens})
    with torch.no_grad():
        without = base(torch.tensor(tokens)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(theirs - without).max() > 1e-3
