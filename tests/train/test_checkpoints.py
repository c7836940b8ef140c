"""Checkpoints: what is kept, what comes back, what is refused, and what becomes of damaged ones."""

import collections
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jlora import DataError
from jlora.disk import dump_json
from jlora.paths import leaves_by_path
from jlora.train import Checkpoints, init_state
from tests.train.runs import OPTIMIZER, assert_same, run, start


class TestCheckpoints:
    def test_the_newest_two_are_kept_and_come_back_bitwise(self, tmp_path, batches):
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step is None
            for steps in (1, 2, 3):
                checkpoints.save(steps, state := run(batches, steps))
            checkpoints.save(3, start())
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"2", "3"}
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step == 3
            assert_same(checkpoints.restore(start()), state)

    @pytest.mark.parametrize("model_state", [None, {"mean": jnp.arange(3.0), "unused": None}])
    def test_a_model_state_comes_back_too(self, tmp_path, model_state):
        state = init_state({"a": jnp.ones(2)}, OPTIMIZER, model_state)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state)
            assert_same(checkpoints.restore(jax.tree.map(jnp.zeros_like, state)), state)

    def test_random_keys_empty_arrays_and_those_of_the_host_come_back_too(self, tmp_path):
        state = {
            "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
            "empty": jnp.zeros((0, 3)),
            "host": np.arange(3.0),
            "narrow": jnp.arange(5, dtype="bfloat16"),
        }
        like = jax.tree.map(lambda leaf: leaf[::-1], state)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state)
            found = checkpoints.restore(like)
            abstract = checkpoints.restore(
                jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state)) | {"host": like["host"]}
            )
        assert type(found["host"]) is np.ndarray
        for other in (found, abstract):
            assert_same(jax.random.key_data(other.pop("keys")), jax.random.key_data(state["keys"]))
            assert_same(other, {name: leaf for name, leaf in state.items() if name != "keys"})

    def test_one_of_the_first_version_which_had_no_manifest_is_read(self, tmp_path, batches):
        state = run(batches, 3)
        layout = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(state).items()}
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        before = collections.namedtuple("TrainState", ["step", "trained", "opt_state"])(*state[:3])
        with ocp.CheckpointManager(tmp_path, options=options) as manager:
            parts = ocp.args.Composite(state=ocp.args.StandardSave(before), layout=ocp.args.JsonSave(layout))
            manager.save(3, args=parts)
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore(start())
            assert_same(found, state)
            assert not any(leaf.committed for leaf in jax.tree.leaves(found))
            run(batches, 5, found, checkpoints=checkpoints)
            assert {path.name for path in tmp_path.iterdir()} == {"3", "5"}

    def test_an_earlier_step_than_the_newest_is_another_runs(self, tmp_path):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(8, start())
            with pytest.raises(DataError, match="holds the checkpoint of step 8, later than 3: another run's"):
                checkpoints.save(3, start())

    def test_a_folder_that_cannot_be_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with Checkpoints(tmp_path / "file") as checkpoints:
            with pytest.raises(DataError, match=f"^{tmp_path}/file: cannot be read: Not a directory"):
                checkpoints.save(1, start())
            with pytest.raises(DataError, match=f"^{tmp_path}/file: cannot be read: Not a directory"):
                checkpoints.restore(start())

    def test_where_there_is_none_it_says_so(self, tmp_path):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(DataError, match="no checkpoint to resume from"):
            checkpoints.restore(start())

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: state._replace(trained=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[::-1]), state.trained)),
            lambda state: state._replace(trained={"other": state.trained["up"]}),
            lambda state: state._replace(opt_state=optax.sgd(0.1, momentum=0.9).init(state.trained)),
        ],
        ids=["shapes", "paths", "optimizer"],
    )
    def test_one_that_does_not_fit_is_refused(self, tmp_path, change):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(4, start())
            with pytest.raises(
                DataError, match=f"^{tmp_path}: the checkpoint of step 4 does not fit this run in .+, such as .+"
            ):
                checkpoints.restore(change(start()))


MANIFEST = "jlora_manifest.json"


def cut(file, rng):
    os.truncate(file, rng.integers(file.stat().st_size))


def flip(file, rng):
    contents = bytearray(file.read_bytes())
    contents[rng.integers(len(contents))] ^= 1 << rng.integers(8)
    file.write_bytes(contents)


def grow(file, rng):
    file.write_bytes(file.read_bytes() + rng.bytes(3))


def delete(file, rng):
    file.unlink()


def swap(file, rng):
    """In place of a file another one, of the checkpoint before or of the same."""
    root = next(parent for parent in file.parents if parent.name == "8").parent
    others = [path for path in root.rglob("*") if path.is_file() and path.read_bytes() != file.read_bytes()]
    shutil.copy(others[rng.integers(len(others))], file)


def pipe(file, rng):
    file.unlink()
    os.mkfifo(file)


def link(file, rng):
    root = next(parent for parent in file.parents if parent.name == "8").parents[1]
    shutil.copy(file, away := root / "away")
    file.unlink()
    file.symlink_to(away)


def folder(file, rng):
    file.unlink()
    file.mkdir()


def unasked(file, rng):
    (file.parent / "unasked").write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 4 and 8, and their states."""
    root, states = tmp_path_factory.mktemp("saved") / "checkpoints", {}
    with Checkpoints(root) as checkpoints:
        for step in (4, 8):
            states[step] = jax.tree.map(lambda leaf, by=step: leaf * by + by, start())._replace(step=jnp.int32(step))
            checkpoints.save(step, states[step])
    return root, states


class TestDamage:
    @pytest.mark.parametrize("damage", [cut, flip, grow, delete, swap, pipe, link, folder, unasked])
    def test_whatever_file_is_damaged_the_one_before_is_taken_and_it_is_said(self, tmp_path, saved, rng, damage):
        root, states = saved
        files = sorted(path.relative_to(root) for path in (root / "8").rglob("*") if path.is_file())
        assert len(files) > 9
        if damage is link:  # a manifest that is read through a link says what it says
            files = [file for file in files if file.name != MANIFEST]
        for number, file in enumerate(files):
            copy = tmp_path / str(number) / "checkpoints"
            shutil.copytree(root, copy)
            damage(copy / file, rng)
            with Checkpoints(copy) as checkpoints:
                with pytest.warns(UserWarning, match=f"checkpoint of step 8 is damaged and passed over: {copy}/8"):
                    found = checkpoints.restore(start())
                assert_same(found, states[4])

    def test_folders_that_changed_places_are_not_taken_for_each_other(self, tmp_path, saved):
        copy = shutil.copytree(saved[0], tmp_path / "checkpoints")
        (copy / "8").rename(copy / "9")
        (copy / "4").rename(copy / "8")
        message = "none of the checkpoints, of steps 8, 9, is as it was written; delete them"
        with (
            Checkpoints(copy) as checkpoints,
            pytest.warns(UserWarning, match="is damaged and passed over") as said,
            pytest.raises(DataError, match=message),
        ):
            checkpoints.restore(start())
        assert [str(warning.message).partition("over: ")[2] for warning in said] == [
            f"{copy}/9: is the checkpoint of step 8",
            f"{copy}/8: is the checkpoint of step 4",
        ]

    def test_a_run_goes_on_from_the_one_before_and_replaces_the_damaged_one(self, tmp_path, batches):
        with Checkpoints(tmp_path) as checkpoints:
            run(batches, 8, checkpoints=checkpoints, checkpoint_every=4)
        (tmp_path / "8" / MANIFEST).unlink()
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.warns(UserWarning, match="checkpoint of step 8 is damaged"):
                state = checkpoints.restore(start())
            whole = run(batches, 9, state, checkpoints=checkpoints, checkpoint_every=4)
        assert {path.name for path in tmp_path.iterdir()} == {"8", "9"}
        with Checkpoints(tmp_path) as checkpoints:
            assert_same(checkpoints.restore(start()), whole)

    @pytest.mark.parametrize(
        "contents",
        [b"", b"{}", b"[]", b"\xff", b"{" * 9999, b'{"format": 1, "files": {}, "about": {}}', b'{"seal": 3}'],
    )
    def test_a_manifest_of_another_kind_is_damage(self, tmp_path, saved, contents):
        copy = shutil.copytree(saved[0], tmp_path / "checkpoints")
        (copy / "8" / MANIFEST).write_bytes(contents)
        with Checkpoints(copy) as checkpoints, pytest.warns(UserWarning, match="of step 8 is damaged"):
            assert checkpoints.latest_step == 4

    @pytest.mark.parametrize(
        "change",
        [{"format": 2}, {"about": 3}, {"about": {}}, {"files": []}, {"files": {"../x": {}}}, {"about": {"step": 8}}],
    )
    def test_a_manifest_that_says_what_it_cannot_is_damage_even_with_its_seal(self, tmp_path, saved, change):
        copy = shutil.copytree(saved[0], tmp_path / "checkpoints")
        said = json.loads((copy / "8" / MANIFEST).read_text()) | change
        del said["seal"]
        seal = hashlib.sha256(dump_json(said)).hexdigest()
        (copy / "8" / MANIFEST).write_text(json.dumps(said | {"seal": seal}))
        with Checkpoints(copy) as checkpoints, pytest.warns(UserWarning, match="of step 8 is damaged"):
            assert checkpoints.latest_step == 4
