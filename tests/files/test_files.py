import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from coin.core.versions import versions
from coin.errors import FileError, StateError
from coin.files.atomic import atomic_path, remove_leftovers, write_text
from coin.files.safetensors import StateFile, load_provenance, load_state, save_state
from coin.files.tensors import check_finite, check_layout, fingerprint, weighted_sum


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def mixed():
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 3, generator=draw)
    return {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=draw).to(
            memory_format=torch.channels_last
        ),
        "transposed": shared.t(),
        "shared": shared,
        "double": torch.randn(2, generator=draw, dtype=torch.float64),
        "half": torch.randn(5, generator=draw).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
    }


def test_a_file_gives_back_tensors_and_provenance(tmp_path, mixed):
    path = tmp_path / "new" / "state.safetensors"
    provenance = {"made_by": "é", "code": [[0.5, 0.5]], "options": {"damping": 1e-3, "label": None}}
    save_state(path, mixed, provenance)
    state, found = load_state(path)
    assert state.keys() == mixed.keys()
    for name, tensor in mixed.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    assert found == {**provenance, "versions": versions()}
    assert found["versions"]["torch"] == version("torch")
    assert {"lightning", "torchvision", "numpy"} < found["versions"].keys()
    assert (found["versions"]["git"] == "unknown") != (Path(__file__).parents[2] / ".git").exists()
    assert load_provenance(path) == found


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError, match="JSON"):
        save_state(path, {"a": torch.ones(2)}, {"folder": Path()})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["state.safetensors"]


def test_leftovers_of_killed_writers_go(tmp_path):
    (tmp_path / "experts").mkdir()
    left, own = (
        tmp_path / "experts" / ".expert.safetensors.x1.tmp",
        tmp_path / "experts" / "mine.tmp",
    )
    for path in (left, own):
        path.write_text("half")
    remove_leftovers(tmp_path)
    assert [path.exists() for path in (left, own)] == [False, True]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(KeyError("x"), KeyError), (OSError(28, "No space left"), FileError), (None, None)],
)
def test_atomic_path_replaces_at_a_good_end_only_and_others_may_read(tmp_path, raised, seen):
    path = tmp_path / "results.csv"
    write_text(path, "old")
    with pytest.raises(seen) if seen else nullcontext(), atomic_path(path) as temporary:
        temporary.write_text("new")
        assert (temporary.parent, path.read_text()) == (path.parent, "old")
        if raised:
            raise raised
    assert path.read_text() == ("old" if raised else "new")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert names_in(tmp_path) == ["results.csv"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FileError, match=r"cannot write '.*state\.safetensors'.*choose a folder"
    ) as caught:
        save_state(tmp_path / "file" / "state.safetensors", {"a": torch.ones(1)}, {})
    assert str(caught.value).count("cannot write") == 1
    with (
        pytest.raises(FileError, match=r"^it is cut off; make it again$"),
        atomic_path(tmp_path / "c"),
    ):
        raise FileError("it is cut off; make it again")


def test_weighted_sum_sums_floats_and_takes_the_largest_count():
    count = "bn.num_batches_tracked"
    first = {
        "weight": torch.tensor([1.0, 2.0]),
        count: torch.tensor(3),
        "double": torch.ones(1).double(),
    }
    second = {
        "weight": torch.tensor([4.0, 8.0]),
        count: torch.tensor(5),
        "double": torch.zeros(1).double(),
    }
    total = weighted_sum([first, second], [0.25, 0.75])
    assert total["weight"].tolist() == [3.25, 6.5]
    assert total["double"].equal(torch.tensor([0.25], dtype=torch.float64))
    assert total[count].equal(torch.tensor(5))
    with pytest.raises(
        StateError, match=r"'order', torch\.int64, differs between experts and has no average"
    ):
        weighted_sum([{"order": torch.arange(3)}, {"order": torch.arange(3).flip(0)}], [0.5, 0.5])
    weighted_sum([first], [1.0])["weight"].zero_()
    assert first["weight"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_entries_that_agree_stay_to_the_last_bit(kind):
    values = torch.tensor([0.1, 1 / 3, -7e-5, 1.0]).to(kind)
    others = [values.clone() for _ in range(3)]
    for index, other in enumerate(others):
        other[3] = index
    weights = [0.1, 0.2, 0.7]  # whose sum in float64 is not 1
    total = weighted_sum([{"a": values, "b": other} for other in others], weights)
    assert total["a"].dtype is kind
    assert torch.equal(total["a"], values)
    assert torch.equal(total["b"][:3], values[:3])
    assert float(total["b"][3]) == pytest.approx(0.2 + 2 * 0.7, rel=1e-3)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])
def test_shared_infinities_stay_and_a_weight_of_zero_takes_none(weights):
    mask = torch.tensor([-torch.inf, 0.0, torch.inf])
    first, second = (
        {"mask": mask, "w": torch.tensor([1.0, -torch.inf])},
        {"mask": mask, "w": torch.tensor([3.0, 2.0])},
    )
    total = weighted_sum([first, second], weights)
    assert torch.equal(total["mask"], mask)
    assert total["w"].tolist() == [weights[0] + 3 * weights[1], -torch.inf if weights[0] else 2.0]


def test_check_layout_names_the_first_tensor_that_differs():
    whole = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
    check_layout(whole, {"b": torch.ones(2, 3), "a": torch.ones(2)}, "expert 1")
    with pytest.raises(
        StateError,
        match=r"'expert 1' has no tensor 'b' \(1 missing\); it is of another architecture",
    ):
        check_layout(whole, {"a": torch.zeros(2)}, "expert 1")
    with pytest.raises(StateError, match=r"'state 2' has a tensor 'c' too many \(1 in all\)"):
        weighted_sum([whole, whole, {**whole, "c": torch.zeros(1)}], [0.5, 0.25, 0.25])
    with pytest.raises(
        StateError, match=r"'state 1' has tensor 'b' of shape \[3, 2\], expected \[2, 3\]"
    ):
        weighted_sum([whole, {**whole, "b": torch.zeros(3, 2)}], [0.5, 0.5])


def test_infinities_are_taken_where_they_are_named_and_nan_is_not():
    mask = torch.full((2, 2), -torch.inf).triu(1)
    state = {"mask": mask, "w": torch.ones(2)}
    both = torch.tensor([-torch.inf, torch.inf])  # whose sum is NaN
    check_finite({"mask": both}, "it", ["mask"])
    for bad, infinite, name in (
        (state, [], "mask"),
        ({**state, "w": torch.tensor([torch.inf])}, ["mask"], "w"),
        ({**state, "mask": torch.tensor([-torch.inf, torch.nan])}, ["mask"], "mask"),
    ):
        with pytest.raises(
            StateError,
            match=rf"^it is not finite: tensor '{name}' holds a NaN or an infinity[^\n]*$",
        ):
            check_finite(bad, "it", infinite)
    check_finite(
        {"count": torch.tensor(2**62), "w": torch.full((4,), 3e38)}, "it"
    )  # only a sum overflows


def test_a_fingerprint_does_not_depend_on_memory_or_order(tmp_path, mixed):
    mark = fingerprint(mixed)
    assert fingerprint(dict(reversed(mixed.items()))) == mark
    contiguous = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in mixed.items()
    }
    assert contiguous["conv.weight"].stride() != mixed["conv.weight"].stride()
    assert fingerprint(contiguous) == mark
    save_state(tmp_path / "state.safetensors", mixed, {"made_by": "anything"})
    assert fingerprint(load_state(tmp_path / "state.safetensors")[0]) == mark


def test_a_fingerprint_changes_with_any_value_type_shape_or_name():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    others = [
        {**state, "a": torch.where(state["a"] == 5, 5 + 2**-21, state["a"])},
        {**state, "a": state["a"].double()},
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "b": torch.tensor(2)},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
    ]
    assert len({fingerprint(entry) for entry in [state, *others]}) == len(others) + 1


def test_it_holds_what_is_named(tmp_path, mixed):
    path = tmp_path / "state.safetensors"
    save_state(path, mixed, {"made_by": "test"})
    wanted, provenance = load_state(path)
    chosen = StateFile(path, ["half", "double"])
    assert (list(chosen), chosen.provenance) == (["half", "double"], provenance)
    assert next(iter(chosen.values())).equal(wanted["half"])
    with pytest.raises(KeyError):
        chosen["count"]


MAIN = """
from coin.files.user_code import source_of
import tools.inside
from . import beside


class Mine: ...


if __name__ == "__main__":
    print(source_of(Mine))
"""


def test_a_class_of_a_module_that_is_run_is_known_with_what_it_imports_and_the_packages_of_that(
    tmp_path,
):
    package = tmp_path / "mypkg"
    package.mkdir()
    write_text(package / "main.py", MAIN)
    write_text(package / "__init__.py", "")
    write_text(tmp_path / "tools/inside.py", "")
    found = []
    for beside, outer in ((1, 1), (1, 1), (2, 1), (2, 2)):
        write_text(package / "beside.py", f"number = {beside}")
        write_text(tmp_path / "tools/__init__.py", f"number = {outer}")
        command = [sys.executable, "-m", "mypkg.main"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    first, again, *others = found
    assert first == again
    assert len({first, *others}) == 3
