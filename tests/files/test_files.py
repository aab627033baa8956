"""Safetensors files, atomic writes, arithmetic and fingerprints of named tensors, the source of a user's class."""

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
from coin.files.packaged import packaged_file
from coin.files.safetensors import StateFile, load_provenance, load_state, save_state
from coin.files.tensors import check_finite, check_layout, fingerprint, weighted_sum


@pytest.fixture
def mixed():
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 3, generator=draw)
    kernel = torch.randn(4, 3, 2, 2, generator=draw)
    return {
        "conv.weight": kernel.to(memory_format=torch.channels_last),
        "transposed": shared.t(),
        "shared": shared,
        "half": torch.randn(5, generator=draw).bfloat16(),
        "count": torch.tensor(7),
    }


def test_a_file_gives_back_tensors_and_provenance(tmp_path, mixed):
    path = tmp_path / "new" / "state.safetensors"
    provenance = {"made_by": "é", "code": [[0.5, 0.5]], "options": {"damping": 1e-3, "label": None}}
    save_state(path, mixed, provenance)
    state, found = load_state(path)
    torch.testing.assert_close(state, mixed, rtol=0, atol=0)
    assert found == load_provenance(path) == {**provenance, "versions": versions()}
    assert found["versions"]["torch"] == version("torch")
    is_repository = (Path(__file__).parents[2] / ".git").exists()
    assert (found["versions"]["git"] != "unknown") == is_repository
    chosen = StateFile(path, ["half", "count"])
    assert (list(chosen), chosen.provenance) == (["half", "count"], found)
    assert torch.equal(chosen["half"], mixed["half"])
    with pytest.raises(KeyError):
        chosen["shared"]


def test_a_package_without_a_file_is_named_with_its_extra():
    with pytest.raises(FileError, match=r"no package nowhere with a file x, .*\.\[text\]"):
        packaged_file("nowhere", "x")


def test_leftovers_of_killed_writers_go(tmp_path):
    left = tmp_path / "experts/.expert.safetensors.x1.tmp"
    own = tmp_path / "experts/mine.tmp"
    write_text(left, "half")
    write_text(own, "half")
    remove_leftovers(tmp_path)
    assert [*own.parent.iterdir()] == [own]


ERRORS = {
    "none": (None, nullcontext()),
    "another": (KeyError("x"), pytest.raises(KeyError)),
    "a full disk": (
        OSError(28, "No space left"),
        pytest.raises(FileError, match=r"^cannot write '.*results\.csv': No space left; free the"),
    ),
    "one that says what it is about": (
        FileError("it is cut off"),
        pytest.raises(FileError, match=r"^it is cut off$"),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_atomic_path_replaces_at_a_good_end_only_and_others_may_read(tmp_path, case):
    error, block = ERRORS[case]
    path = tmp_path / "results.csv"
    write_text(path, "old")
    with block, atomic_path(path) as temporary:
        temporary.write_text("new")
        assert (temporary.parent, path.read_text()) == (path.parent, "old")
        if error:
            raise error
    assert path.read_text() == ("old" if error else "new")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    message = r"^cannot write '[^']*state': [^\n]*choose a folder you can write to$"
    with pytest.raises(FileError, match=message):
        save_state(tmp_path / "file/state", {"a": torch.ones(1)}, {})


def test_weighted_sum_sums_floats_and_takes_the_largest_count():
    count = "bn.num_batches_tracked"
    first = {"weight": torch.tensor([1.0, 2.0]), count: torch.tensor(3)}
    second = {"weight": torch.tensor([4.0, 8.0]), count: torch.tensor(5)}
    total = weighted_sum([first, second], [0.25, 0.75])
    torch.testing.assert_close(total, {"weight": torch.tensor([3.25, 6.5]), count: torch.tensor(5)})
    weighted_sum([first], [1.0])["weight"].zero_()
    assert first["weight"].tolist() == [1.0, 2.0]


def test_other_integers_that_differ_have_no_average():
    orders = [{"order": torch.arange(3)}, {"order": torch.arange(3).flip(0)}]
    with pytest.raises(StateError, match=r"'order', torch\.int64, differs between experts"):
        weighted_sum(orders, [0.5, 0.5])


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_entries_that_agree_stay_to_the_last_bit(kind):
    values = torch.tensor([0.1, 1 / 3, -7e-5]).to(kind)
    weights = [0.1, 0.2, 0.7]  # whose sum in float64 is not 1
    states = [{"a": torch.cat([values, values.new_full([1], index)])} for index in range(3)]
    total = weighted_sum(states, weights)["a"]
    assert total.dtype is kind
    assert torch.equal(total[:3], values)
    assert float(total[3]) == pytest.approx(0.2 + 2 * 0.7, rel=1e-3)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])
def test_shared_infinities_stay_and_a_weight_of_zero_takes_none(weights):
    mask = torch.tensor([-torch.inf, 0.0, torch.inf])
    first = {"mask": mask, "w": torch.tensor([1.0, -torch.inf])}
    second = {"mask": mask, "w": torch.tensor([3.0, 2.0])}
    total = weighted_sum([first, second], weights)
    assert torch.equal(total["mask"], mask)
    assert total["w"].tolist() == [weights[0] + 3 * weights[1], -torch.inf if weights[0] else 2.0]


OTHERS = {
    r"'it' has no tensor 'b' \(1 missing\); it is of another": {"a": torch.zeros(2)},
    r"'it' has a tensor 'c' too many \(1 in all\)": dict.fromkeys("abc", torch.zeros(2)),
    r"'it' has tensor 'b' of shape \[2\], expected \[2, 3\]": dict.fromkeys("ab", torch.zeros(2)),
}


@pytest.mark.parametrize("message", OTHERS)
def test_the_first_tensor_that_differs_is_named(message):
    whole = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
    check_layout(whole, dict(reversed(whole.items())), "it")
    with pytest.raises(StateError, match=message):
        check_layout(whole, OTHERS[message], "it")


@pytest.mark.parametrize(
    ("name", "value", "infinite"),
    [("mask", torch.inf, ()), ("w", -torch.inf, ["mask"]), ("mask", torch.nan, ["mask"])],
)
def test_infinities_are_taken_where_they_are_named_and_nan_is_not(name, value, infinite):
    large = torch.full((4,), 3e38)  # only a sum overflows
    state = {"mask": torch.tensor([-torch.inf, torch.inf]), "w": large}  # nor is this sum's NaN
    check_finite(state, "it", ["mask"])
    wrong = {name: torch.tensor([1.0, value])}
    message = rf"^it is not finite: tensor '{name}' holds a NaN or an infinity[^\n]*$"
    with pytest.raises(StateError, match=message):
        check_finite({"count": torch.tensor(2**62)} | wrong, "it", infinite)


def test_a_fingerprint_does_not_depend_on_memory_or_order(tmp_path, mixed):
    mark = fingerprint(mixed)
    assert fingerprint(dict(reversed(mixed.items()))) == mark
    save_state(tmp_path / "state", mixed, {"made_by": "anything"})
    read, _ = load_state(tmp_path / "state")
    assert read["conv.weight"].stride() != mixed["conv.weight"].stride()
    assert fingerprint(read) == mark


def test_a_fingerprint_changes_with_any_value_type_shape_or_name():
    values = torch.arange(6.0).reshape(2, 3)
    states = [
        {"a": values},
        {"a": torch.where(values == 5, 5 + 2**-21, values)},
        {"a": values.double()},
        {"a": values.reshape(3, 2)},
        {"b": values},
        {"a": values, "b": values},
    ]
    assert len(set(map(fingerprint, states))) == len(states)


MAIN = """
from coin.files.user_code import source_of
import tools.inside
from . import beside


class Mine: ...


if __name__ == "__main__":
    print(source_of(Mine))
"""


def test_a_class_is_known_with_what_its_module_imports_and_the_packages_of_that(tmp_path):
    package = tmp_path / "mypkg"
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
