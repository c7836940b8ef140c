"""The digits recipe: upright and shifted digits, and a base that is trained once and cached."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jlora import ConfigError, DataError
from jlora.recipes import digits

SIZES = {"width": 6, "depth": 1, "heads": 2, "hidden": 5, "patch": 4}


def rows(examples):
    """Every example as something that can be compared and counted."""
    return [(image.tobytes(), int(label)) for image, label in zip(examples["inputs"], examples["labels"], strict=True)]


class TestData:
    @pytest.mark.parametrize("options", [{}, {"rotate": 180, "invert": False}])
    def test_shapes_dtypes_and_ranges(self, options):
        train, test = digits.data(**options)
        assert (len(train["labels"]), len(test["labels"])) == (1348, 449)
        for part in (train, test):
            assert set(part) == {"inputs", "labels"}
            assert part["inputs"].shape == (len(part["labels"]), 8, 8)
            assert (part["inputs"].dtype, part["labels"].dtype) == (np.float32, np.int32)
            assert (part["inputs"].min(), part["inputs"].max()) == (0.0, 1.0)
            assert set(part["labels"]) == set(range(10))

    @pytest.mark.parametrize("invert", [True, False])
    @pytest.mark.parametrize("rotate", [0, 90, 180, 270, -90, 450])
    def test_rotation_and_inversion_undone_give_the_upright_ones(self, rotate, invert):
        for shifted, upright in zip(digits.data(rotate, invert), digits.data(0, False), strict=True):
            images = 1 - shifted["inputs"] if invert else shifted["inputs"]
            undone = np.stack([np.rot90(image, -rotate // 90) for image in images])
            np.testing.assert_array_equal(undone, upright["inputs"])
            np.testing.assert_array_equal(shifted["labels"], upright["labels"])

    def test_ninety_degrees_are_counter_clockwise(self):
        turned, upright = (digits.data(rotate, False)[0]["inputs"] for rotate in (90, 0))
        np.testing.assert_array_equal(turned[:, -1, 0], upright[:, 0, 0])
        np.testing.assert_array_equal(turned[:, 0, :], upright[:, :, -1])

    def test_the_parts_are_all_digits_each_once(self):
        source = load_digits()
        wanted = {"inputs": (source.images / 16).astype(np.float32), "labels": source.target}
        train, test = digits.data(0, False)
        assert sorted(rows(train) + rows(test)) == sorted(rows(wanted))
        assert len(set(rows(wanted))) == len(rows(wanted))
        assert not set(rows(train)) & set(rows(test))

    def test_the_split_is_the_same_for_every_shift(self):
        np.testing.assert_array_equal(digits.data(90, True)[1]["labels"], digits.data(0, False)[1]["labels"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rotate": 45}, "data.rotate = 45: wanted a multiple of 90"),
            ({"rotate": 90.5}, "data.rotate = 90.5: wanted a whole number of at least -360"),
            ({"invert": "False"}, "data.invert = 'False': wanted true or false"),
        ],
    )
    def test_options_that_make_no_data_are_refused(self, options, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            digits.data(**options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a cache, and the base that was trained into it."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, digits.model(**SIZES, steps=3, cache=str(cache))[1]


@pytest.fixture
def pretrained(monkeypatch):
    """The trainings from here on; each gives ones at once."""
    calls = []

    def instead(module, params, steps, seed, console):
        calls.append((steps, seed))
        return jax.tree.map(jnp.ones_like, params)

    monkeypatch.setattr(digits, "_pretrain", instead)
    return calls


class TestModel:
    def test_the_base_has_the_sizes_asked_for(self, trained):
        params = trained[1]
        assert params["patches"]["kernel"].shape == (4, 4, 1, 6)
        assert params["positions"].shape == (4, 6)
        assert params["block_0"]["attention"]["query"]["kernel"].shape == (6, 2, 3)
        assert params["block_0"]["up"]["kernel"].shape == (6, 5)
        assert params["head"]["kernel"].shape == (6, 10)
        assert "block_1" not in params

    def test_a_second_call_reads_the_cache_bitwise(self, trained, pretrained):
        cache, params = trained
        module, again = digits.model(**SIZES, steps=3, cache=str(cache))
        jax.tree.map(np.testing.assert_array_equal, params, again)
        assert jax.tree.structure(params) == jax.tree.structure(again)
        assert pretrained == []
        assert [file.suffix for file in cache.iterdir()] == [".npz"]
        assert module.apply({"params": again}, jnp.zeros((3, 8, 8))).shape == (3, 10)

    def test_the_same_seed_trains_the_same_base_elsewhere(self, trained, tmp_path):
        again = digits.model(**SIZES, steps=3, cache=str(tmp_path / "made" / "here"))[1]
        jax.tree.map(np.testing.assert_array_equal, trained[1], again)

    @pytest.mark.parametrize(
        "change", [{"seed": 1}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({"steps": 4}, {"hidden": 7}))]
    )
    def test_other_settings_are_another_file(self, tmp_path, pretrained, change):
        for settings in ({}, change, {}, change):
            digits.model(**{**SIZES, "steps": 3, "cache": str(tmp_path), **settings})
        assert pretrained == [(3, 0), (change.get("steps", 3), change.get("seed", 0))]
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda whole: b"",
            lambda whole: b"no zip file",
            lambda whole: whole[: len(whole) // 2],
            lambda whole: whole[:-9],
            lambda whole: bytes(byte ^ 255 if 200 < at < 900 else byte for at, byte in enumerate(whole)),
        ],
        ids=["empty", "text", "half", "cut", "flipped bits"],
    )
    def test_a_spoiled_file_is_trained_anew(self, tmp_path, pretrained, spoil):
        settings = {**SIZES, "steps": 3, "cache": str(tmp_path)}
        digits.model(**settings)
        (file,) = tmp_path.iterdir()
        file.write_bytes(spoil(file.read_bytes()))
        digits.model(**settings)
        digits.model(**settings)
        assert len(pretrained) == 2
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize("change", [{"patches/kernel": np.ones((2, 2, 1, 6))}, {"positions": None}])
    def test_a_file_of_another_model_is_trained_anew(self, tmp_path, pretrained, change):
        settings = {**SIZES, "steps": 3, "cache": str(tmp_path)}
        digits.model(**settings)
        (file,) = tmp_path.iterdir()
        with np.load(file) as arrays:
            other = {path: array for path, array in {**arrays, **change}.items() if array is not None}
        np.savez(file, **other)
        digits.model(**settings)
        assert len(pretrained) == 2

    def test_home_is_expanded(self, tmp_path, monkeypatch, pretrained):
        monkeypatch.setenv("HOME", str(tmp_path))
        digits.model(**SIZES, steps=3, cache="~/here")
        assert len(list((tmp_path / "here").iterdir())) == 1

    def test_a_cache_that_cannot_be_written_says_so(self, tmp_path, pretrained):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"the base cannot be cached: .*; give model.cache another folder"):
            digits.model(**SIZES, steps=3, cache=str(tmp_path / "file"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 7}, "model.heads = 2: wanted a divisor of width = 7"),
            ({"patch": 3}, "model.patch = 3: wanted a divisor of 8, the side of the images"),
            ({"seed": -1}, "model.seed = -1: wanted a whole number of at least 0 and below 4294967296"),
            ({"cache": 5}, "model.cache = 5: wanted the path of a folder"),
            ({"depth": 0}, "depth = 0: wanted a whole number of at least 1"),
            ({"heads": 1.5}, "heads = 1.5: wanted a whole number of at least 1"),
            ({"steps": 0}, "steps = 0: wanted a whole number of at least 1"),
        ],
    )
    def test_sizes_that_make_no_model_are_refused(self, tmp_path, change, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            digits.model(**SIZES | {"cache": str(tmp_path)} | change)
        assert list(tmp_path.iterdir()) == []
