"""What the rules of inference engines say of adapters of each kind."""

import pytest

from jlora.interop.engines import ENGINES, Handed, verdict

MODULES = ("self_attn.q_proj", "self_attn.v_proj")
DATA = {
    "peft_type": "LORA",
    "r": 5,
    "lora_alpha": 10,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "init_lora_weights": True,
}


def shapes_of(*modules, prefix="base_model.model.model.layers.0."):
    found = {}
    for module in modules:
        found |= {f"{prefix}{module}.lora_A.weight": (5, 12), f"{prefix}{module}.lora_B.weight": (14, 5)}
    return found


def said(engine, shapes=None, *, architecture="LlamaForCausalLM", **changes):
    handed = {name: changes.pop(name) for name in ("vocabulary", "elsewhere", "files") if name in changes}
    shapes = shapes_of(*MODULES) if shapes is None else shapes
    return verdict(ENGINES[engine], Handed(shapes, DATA | changes, architecture, **handed))


def without(key):
    return {name: value for name, value in DATA.items() if name != key}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_adapter_loads(engine):
    assert said(engine).problems == ()


@pytest.mark.parametrize(
    ("rank", "option"),
    [(16, ()), (17, ("--max-lora-rank 32",)), (64, ("--max-lora-rank 64",)), (300, ("--max-lora-rank 320",))],
)
def test_ranks_in_vllm(rank, option):
    assert said("vllm", r=rank).options == option
    assert said("vllm", r=8, rank_pattern={"q_proj": rank}).options == option


def test_a_rank_beyond_vllms_largest():
    found = said("vllm", r=513)
    assert found.options == ()
    assert found.problems[0].startswith("rank 513: at most 512")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"lora_bias": True}, "lora_bias: "),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head", "score"]}, "modules_to_save: lm_head: "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens: "),
        ({"layer_replication": [[0, 2]]}, "layer_replication: "),
        ({"use_bdlora": {"a": 1}}, "use_bdlora: "),
        ({"use_qalora": True}, "use_qalora: "),
    ],
)
def test_what_vllm_refuses(changes, problem):
    (found,) = said("vllm", **changes).problems
    assert found.startswith(problem)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"init_lora_weights": "Gaussian"},
        {"modules_to_save": ["score"]},
        {"alpha_pattern": {"q_proj": 3}},
    ],
)
def test_what_vllm_takes(changes):
    assert said("vllm", **changes).loads


def test_names_that_vllm_refuses():
    saved = {"base_model.model.model.norm.weight": (12,), "base_model.model.score.weight": (2, 12)}
    copies = {"base_model.model.model.embed_tokens.base_layer.weight": (37, 12)}
    (problem,) = said("vllm", shapes_of(*MODULES) | saved | copies).problems
    assert problem == "names that are refused: base_model.model.model.norm.weight"


@pytest.mark.parametrize(
    ("architecture", "refused"),
    [
        ("LlamaForCausalLM", []),
        ("Qwen3ForCausalLM", []),
        ("Phi3ForCausalLM", []),
        ("MistralForCausalLM", ["embed_tokens", "lm_head"]),
        ("Gemma2ForCausalLM", ["embed_tokens", "lm_head"]),
        ("Olmo2ForCausalLM", ["lm_head"]),
        ("Unheard", []),
    ],
)
def test_embeddings_in_vllm(architecture, refused):
    table = {
        "base_model.model.model.embed_tokens.lora_embedding_A": (5, 37),
        "base_model.model.model.embed_tokens.lora_embedding_B": (12, 5),
        **shapes_of("lm_head", prefix="base_model.model."),
    }
    found = said("vllm", table, architecture=architecture, vocabulary=37)
    assert [problem.partition(":")[0] for problem in found.problems] == refused
    assert "an embedding of 37 rows: the base has 41" in said("vllm", table, vocabulary=41).problems
    assert any("258,048" in problem for problem in said("vllm", table, vocabulary=262_144).problems)


@pytest.mark.parametrize(
    ("prefix", "loads"),
    [("model.language_model.layers.3.", True), ("language_model.model.layers.3.", True), ("model.layers.3.", False)],
)
def test_vision_language_models_in_vllm(prefix, loads):
    shapes = shapes_of(*MODULES, prefix=f"base_model.model.{prefix}")
    assert said("vllm", shapes, architecture="Gemma3ForConditionalGeneration").loads is loads
    assert said("vllm", shapes, architecture="Qwen2VLForConditionalGeneration").loads
    tower = shapes_of("visual.blocks.0.attn.proj", prefix="base_model.model.")
    options = said("vllm", tower, architecture="Qwen2VLForConditionalGeneration").options
    assert options == ("enable_tower_connector_lora",)


@pytest.mark.parametrize("engine", ["peft", "vllm"])
def test_names_that_are_passed_over(engine):
    (problem,) = said(engine, elsewhere={"a.weight": "model.a.weight"}).problems
    assert (
        problem
        == "1 weights have other names than in the base, and would be passed over: a.weight is model.a.weight there"
    )
    assert said("sglang", elsewhere={"a.weight": "model.a.weight"}).loads


def test_names_without_the_prefix():
    shapes = shapes_of(*MODULES, prefix="model.layers.0.")
    assert said("peft", shapes).problems[0].startswith("names without base_model.model.")
    assert said("vllm", shapes).loads
    assert said("sglang", shapes).loads


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"use_rslora": True}, "use_rslora is passed over: the scaling would be 10 / 5; say lora_alpha = 22.3607"),
        ({"rank_pattern": {"q_proj": 7}}, "rank_pattern is passed over"),
        ({"alpha_pattern": {"q_proj": 7}}, "alpha_pattern is passed over"),
        ({"target_modules": r".*\.q_proj"}, "target_modules = "),
        ({"target_modules": None}, "target_modules names no modules"),
        ({"files": ["added_tokens.json"]}, "added_tokens.json: "),
        ({"peft_type": "LOHA"}, "adapter_config.json has no peft_type LORA"),
    ],
)
def test_what_sglang_does_not_serve(changes, problem):
    (found,) = said("sglang", **changes).problems
    assert found.startswith(problem)


@pytest.mark.parametrize(
    "changes", [{"target_modules": "all-linear"}, {"rank_pattern": {"q_proj": 5}}, {"alpha_pattern": {"v": 10}}]
)
def test_what_sglang_serves(changes):
    assert said("sglang", **changes).loads


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        (("self_attn.q_proj",), "q_proj without v_proj"),
        (("self_attn.k_proj", "self_attn.v_proj"), "k_proj without q_proj"),
        (("mlp.up_proj",), "up_proj without gate_proj"),
        (("mlp.gate_proj", "mlp.down_proj"), None),
        (("self_attn.q_proj", "self_attn.v_proj"), None),
        (("mlp.experts", "mlp.experts.base_layer"), "experts as parameters"),
    ],
)
def test_joined_projections_in_sglang(modules, problem):
    problems = said("sglang", shapes_of(*modules)).problems
    if problem is None:
        assert problems == ()
    else:
        assert any(found.startswith(problem) for found in problems)


def test_tensors_that_sglang_has_no_place_for():
    names = {"base_model.model.model.layers.0.input_layernorm.weight": (12,)}
    assert "neither A nor B" in said("sglang", shapes_of(*MODULES) | names).problems[0]
    of_gpt2 = shapes_of("attn.c_attn", prefix="base_model.model.transformer.h.0.")
    assert "without a number behind layers." in said("sglang", of_gpt2).problems[0]
    head = shapes_of(*MODULES) | shapes_of("lm_head", prefix="base_model.model.")
    assert said("sglang", head).problems == ("lm_head is passed over: target_modules does not name it",)
    assert said("sglang", head, target_modules=["q_proj", "v_proj", "lm_head"]).loads


def test_stacked_experts_in_vllm():
    experts = shapes_of("mlp.experts", "mlp.experts.base_layer")
    (option,) = said("vllm", experts, architecture="Qwen3MoeForCausalLM").options
    assert option.startswith("--enable-mixed-moe-lora-format")
    assert said("vllm", experts, architecture="Qwen3VLMoeForConditionalGeneration").options == ()


@pytest.mark.parametrize(("engine", "key"), [("peft", "peft_type"), ("vllm", "lora_alpha"), ("sglang", "r")])
def test_a_configuration_that_lacks_a_key(engine, key):
    found = verdict(ENGINES[engine], Handed(shapes_of(*MODULES), without(key), "LlamaForCausalLM"))
    assert found.problems == (f"adapter_config.json has no {key}",)


KEYS = [*DATA, "alpha_pattern", "use_rslora", "use_dora"]
VALUES = [None, [], {}, "x", 3, -1, 1.5, True, [1], [None], {"a": "b"}, {"q": None}, float("nan"), [["a"]], "y" * 5000]


@pytest.mark.parametrize("key", KEYS)
def test_values_that_are_no_settings_are_judged_too(key):
    """A file that cannot be read as an adapter is shown to the engines as well."""
    for value in VALUES:
        for engine in ENGINES:
            for more in ({}, {"use_rslora": True}):
                found = said(engine, **{**more, key: value})
                assert all(len(problem) < 400 for problem in found.problems)
