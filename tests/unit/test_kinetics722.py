"""`openeva data kinetics722` on small trees: what is kept, what is dropped and why, and what is said about bad data."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from e2e.videos import write_video
from openeva.cli import app
from openeva.config import ConfigError
from openeva.data import kinetics722
from openeva.data.kinetics722 import Merged, Options, build, check, merge
from openeva.data.kinetics_classes import SETS, SPLITS, locate, table_of

Tree = dict[str, dict[str, dict[str, list[str]]]]


def file(youtube_id: str) -> str:
    return f"{youtube_id:x<11}_000001_000011.mp4"


def tree_of(**lists: dict[str, list[str]]) -> Tree:
    """Per list ("k400_train") the ids in each class; every list has a video of its own besides."""
    tree: Tree = {key: {split: {} for split in SPLITS} for key in SETS}
    for key in SETS:
        for split in SPLITS:
            for name, ids in {"zumba": [], **lists.get(f"{key}_{split}", {})}.items():
                own = [f"own-{key}{split[0]}"] if name == "zumba" else []
                tree[key][split][name] = [file(one) for one in [*ids, *own]]
    return tree


def merged(tree: Tree, **options: Any) -> Merged:
    return merge({k: {s: table_of(f"{k}/{s}", tree[k][s]) for s in SPLITS} for k in SETS}, **options)


def ids(made: Merged, name: str) -> list[str]:
    return [one.youtube_id.rstrip("x") for one in made.lists[name].clips if not one.youtube_id.startswith("own-")]


def dropped(made: Merged, name: str) -> list[tuple[str, str, str]]:
    return [(one.clip.path, one.reason, one.kept.path if one.kept else "") for one in made.lists[name].dropped]


# ------------------------------------------------------------------------------------------------------- merging


def test_one_class_under_two_names_has_one_label() -> None:
    names = {"k400": "changing wheel", "k600": "changing wheel (not on bike)", "k700": "changing wheel (not on bike)"}
    tree = tree_of(**{f"{key}_{split}": {name: [f"{key}{split}"]} for key, name in names.items() for split in SPLITS})
    made = merged(tree)
    assert made.classes.names == ["changing wheel (not on bike)", "zumba"]
    assert made.classes.own_names["k400"] == ["changing wheel", "zumba"]
    wheels = [line for line in made.lists["k722_train"].lines() if "wheel" in line]
    assert wheels == [f"{key}/train/{name}/{file(key + 'train')} 0" for key, name in names.items()]


def test_k400_is_filtered_by_its_validation_list_only_when_asked() -> None:
    lists = {f"{key}_{split}": {"abseiling": [f"{key}leak"]} for key in SETS for split in SPLITS}
    official, filtered = merged(tree_of(**lists)), merged(tree_of(**lists), filter_k400=True)
    assert [ids(official, f"{key}_train") for key in SETS] == [["k400leak"], [], []]
    assert ids(filtered, "k400_train") == []
    assert ids(official, "k722_train") == ids(filtered, "k722_train") == []
    assert dropped(filtered, "k400_train") == [
        (f"k400/train/abseiling/{file('k400leak')}", "in val", f"k400/val/abseiling/{file('k400leak')}")
    ]


def test_copies_of_another_class_are_told() -> None:
    made = merged(
        tree_of(
            k400_val={"abseiling": [], "changing wheel": []},
            k400_train={"abseiling": ["twice"], "changing wheel": ["same"]},
            k700_val={"abseiling": [], "changing wheel (not on bike)": []},
            k700_train={"abseiling": [], "changing wheel (not on bike)": ["twice", "same"]},
        )
    )
    assert ids(made, "k722_train") == ["twice", "same"]
    others = {one.clip.youtube_id.rstrip("x"): one.other_class for one in made.lists["k722_train"].dropped}
    assert others == {"twice": "abseiling", "same": ""}  # two spellings of a class are no conflict


def test_a_class_without_a_validation_folder_has_no_label() -> None:
    made = merged(tree_of(k400_train={"juggling": ["a"]}, k600_val={"juggling": ["b"]}, k700_train={"yoga": ["c"]}))
    assert ids(made, "k400_train") == []
    assert ids(made, "k722_train") == ["a"]  # K-722 has the class, by K-600
    assert (f"k700/train/yoga/{file('c')}", "no label", "") in dropped(made, "k722_train")


some_ids = st.lists(st.sampled_from("abcdefghijkl"), max_size=8, unique=True)
trees = st.fixed_dictionaries(
    {key: st.fixed_dictionaries({s: st.dictionaries(st.sampled_from("XYZ"), some_ids) for s in SPLITS}) for key in SETS}
)


@given(trees)
def test_no_video_twice_none_of_a_validation_set_and_none_lost(random_tree: Any) -> None:
    tree = tree_of(**{f"{key}_{split}": random_tree[key][split] for key in SETS for split in SPLITS})
    made = merged(tree)
    in_val = {one.youtube_id for key in SETS for one in made.lists[f"{key}_val"].clips}
    for name, one in made.lists.items():
        kept = [clip.youtube_id for clip in one.clips]
        assert len(kept) == len(set(kept))
        if name in {"k600_train", "k700_train"}:
            assert not set(kept) & {clip.youtube_id for clip in made.lists[name.replace("train", "val")].clips}
        key, _, split = name.partition("_")
        parts = SETS if key == "k722" else (key,)
        given_files = {f"{p}/{split}/{c}/{f}" for p in parts for c, files in tree[p][split].items() for f in files}
        assert sorted([clip.path for clip in one.clips] + [d.clip.path for d in one.dropped]) == sorted(given_files)
        assert all(d.kept is None or d.kept.youtube_id == d.clip.youtube_id for d in one.dropped)
    train = {clip.youtube_id for clip in made.lists["k722_train"].clips}
    assert not train & in_val
    assert {clip.youtube_id for clip in made.lists["k722_val"].clips} == in_val


def test_labels_follow_ascii_order_and_the_first_copy_stands_for_all() -> None:
    lists = {"k400_val": {"yoga": ["a"]}, "k600_val": {"Zorbing": ["a"]}, "k700_train": {"zumba": ["a"]}}
    made = merged(tree_of(**lists))
    assert made.classes.names == ["Zorbing", "yoga", "zumba"]
    first = f"k400/val/yoga/{file('a')}"
    assert dropped(made, "k722_train") == [(f"k700/train/zumba/{file('a')}", "in val", first)]
    assert dropped(made, "k722_val") == [(f"k600/val/Zorbing/{file('a')}", "duplicate", first)]


@pytest.mark.parametrize("split", SPLITS)
def test_both_spellings_in_one_set(split: str, tmp_path: Path) -> None:
    both = {"cooking sausages": ["a"], "cooking sausages (not on barbeque)": ["b"]}
    on_disk(tmp_path, tree_of(**{f"k400_{split}": both}))
    with pytest.raises(ConfigError, match=f"k400/{split}: the folders 'cooking sausages' and .* are one class; move"):
        made_of(tmp_path)
    if split == "val":  # its folders make the classes
        with pytest.raises(ConfigError, match="are one class; move"):
            merged(tree_of(k400_val=both))


def test_a_class_that_is_spelled_otherwise_in_another_set() -> None:
    with pytest.raises(ConfigError, match="k400/val/Air_drumming and k700/val/air drumming are one class"):
        merged(tree_of(k400_val={"Air_drumming": ["a"]}, k700_val={"air drumming": ["b"]}))


# ------------------------------------------------------------------------------------------------- folders and files


def on_disk(root: Path, tree: Tree, content: bytes = b"") -> None:
    for key, splits in tree.items():
        for split, classes in splits.items():
            for name, files in classes.items():
                (root / key / split / name).mkdir(parents=True, exist_ok=True)
                for one in files:
                    (root / key / split / name / one).write_bytes(content)


def made_of(root: Path, out: str = "out", watch: Any = None, **options: Any) -> Any:
    return build(root / out, *locate(root, {}), Options(num_workers=1, **options), watch)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_of(
        k400_train={"abseiling": ["b", "a", "d"], "massaging person's head": ["a"]}, k400_val={"abseiling": ["c"]},
        k700_train={"zumba": ["d"]}, k700_val={"massaging person's head": ["e"], "no video left": []},
    )  # fmt: skip
    on_disk(tmp_path, tree)
    (tmp_path / "k400/train/abseiling/notes.txt").touch()
    (tmp_path / "k400/train/abseiling/._aaaaaaaaaaa.mp4").touch()
    (tmp_path / "k400/train/abseiling/upperxxxxxx.MKV").touch()
    scandir = os.scandir

    class Backwards:
        def __init__(self, place: Any) -> None:
            self.entries = sorted(scandir(place), key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)  # file systems list in any order
    made = made_of(tmp_path)
    monkeypatch.undo()
    out = tmp_path / "out"
    assert lines(out / "k400_train.txt") == [
        f"k400/train/abseiling/{file('a')} 0", f"k400/train/abseiling/{file('b')} 0",
        f"k400/train/abseiling/{file('d')} 0", "k400/train/abseiling/upperxxxxxx.MKV 0",
        f"k400/train/zumba/{file('own-k400t')} 1",
    ]  # fmt: skip
    names = ["id,name", "0,abseiling", "1,massaging person's head", "2,no video left", "3,zumba"]
    assert lines(out / "labels_722.csv") == names
    assert lines(out / "labels_400.csv") == ["id,name", "0,abseiling", "1,zumba"]
    arrays = {key: json.loads((out / f"k722_to_{key}.json").read_text()) for key in SETS}
    assert arrays == {"k400": [0, 3], "k600": [3], "k700": [1, 2, 3]}
    with (out / "report.csv").open(newline="") as opened:
        rows = [(r["list"], r["path"], r["reason"], r["kept"], r["other_class"]) for r in csv.DictReader(opened)]
    assert rows == [
        ("k400_train", f"k400/train/massaging person's head/{file('a')}", "no label", "", ""),
        ("k722_train", f"k400/train/massaging person's head/{file('a')}", "duplicate",
         f"k400/train/abseiling/{file('a')}", "abseiling"),
        ("k722_train", f"k700/train/zumba/{file('d')}", "duplicate", f"k400/train/abseiling/{file('d')}", "abseiling"),
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{name}.txt" for name in made.merged.lists), *(f"labels_{n}.csv" for n in (400, 600, 700, 722)),
         *(f"k722_to_{key}.json" for key in SETS), "report.csv", "report.md"]
    )  # fmt: skip
    report = (out / "report.md").read_text()
    assert "| k722_train | 7 | ~629,300 | 9 | 2 | 0 | 0 | 0 |" in report
    for note in (
        "k700/val: 1 class folder ('no video left') without videos",
        'k400/train: 1 class folder ("massaging person\'s head") that k400/val does not have',
        "k722_train: dropped though of another class than the video that is kept: 2",
        "k722 has 4 classes, the official one 722",
    ):
        assert note in report, note


def test_sets_in_other_places(tmp_path: Path) -> None:
    on_disk(tmp_path / "a", tree_of())
    (tmp_path / "a/k600").rename(tmp_path / "sixhundred")
    out = tmp_path / "out"
    build(out, *locate(tmp_path / "a", {"k600": tmp_path / "sixhundred"}), Options())
    assert lines(out / "k400_val.txt") == [f"k400/val/zumba/{file('own-k400v')} 0"]
    assert lines(out / "k600_val.txt") == [f"{tmp_path}/sixhundred/val/zumba/{file('own-k600v')} 0"]
    places = {"k400": tmp_path / "a/k400", "k600": tmp_path / "sixhundred", "k700": tmp_path / "a/k700"}
    build(tmp_path / "all", *locate(None, places), Options())
    assert lines(tmp_path / "all/k722_val.txt") == [
        f"a/k400/val/zumba/{file('own-k400v')} 0", f"sixhundred/val/zumba/{file('own-k600v')} 0",
        f"a/k700/val/zumba/{file('own-k700v')} 0",
    ]  # fmt: skip


def test_other_lists_are_only_replaced_when_asked(tmp_path: Path) -> None:
    on_disk(tmp_path, tree_of())
    made_of(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    made_of(tmp_path)  # the same lists
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "k400/val/zumba" / file("new")).touch()
    with pytest.raises(ConfigError, match=r"holds 2 files \('k400_val.txt', .*--overwrite"):
        made_of(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    made_of(tmp_path, overwrite=True)
    assert len(lines(tmp_path / "out/k400_val.txt")) == 2


def test_all_that_is_wrong_with_the_folders_is_told_at_once(tmp_path: Path) -> None:
    on_disk(tmp_path, tree_of())
    (tmp_path / "k400").rename(tmp_path / "kinetics400")
    (tmp_path / "k600/val").rename(tmp_path / "k600/validate")
    done = CliRunner().invoke(app, ["data", "kinetics722", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    text = " ".join(done.output.split())
    assert f"k400: {tmp_path / 'k400'} does not exist; K-722 is made of all three sets" in text
    assert f"k600: no folder val in {tmp_path / 'k600'} (it has train, validate); expected is" in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"(?s)--k600: missing.*--k700: missing"):
        locate(None, {"k400": tmp_path / "kinetics400"})
    with pytest.raises(ConfigError, match="k600 and k700 are the same folder"):
        locate(tmp_path, {"k400": tmp_path / "kinetics400", "k600": tmp_path / "k700"})


def test_all_that_is_wrong_with_the_videos_is_told_at_once(tmp_path: Path) -> None:
    on_disk(tmp_path, tree_of(k600_train={"yoga": ["a"]}))
    (tmp_path / "k400/train/zumba/short.mp4").touch()
    (tmp_path / "k400/train/zumba/tenletters.webm").touch()  # with its ending it is longer than an id
    (tmp_path / "k600/train/yoga" / file("two\nlines")).touch()
    (tmp_path / "k600/train/yoga" / os.fsdecode(b"latin1\xe9aaaaaa.mp4")).touch()
    on_disk(tmp_path, {"k700": {"train": {"two\nlines": [file("a")]}}})
    (tmp_path / "k700/val/zumba" / file("own-k700v")).unlink()
    with pytest.raises(ConfigError) as error:
        made_of(tmp_path)
    short, odd, odd_class, empty = error.value.problems
    assert "k400/train: 2 files ('zumba/short.mp4', 'zumba/tenletters.webm')" in short
    assert "fewer than 11 characters" in short
    assert "k600/train: 2 files" in odd
    assert "line break" in odd
    assert "k700/train: 1 file" in odd_class
    assert "no videos in its class folders; expected is k700/val/<class>/" in empty


def test_the_command_shows_counts_beside_the_official_ones(tmp_path: Path) -> None:
    on_disk(tmp_path, tree_of(k400_train={"abseiling": ["a"]}, k400_val={"abseiling": ["a"]}))
    done = CliRunner().invoke(app, ["data", "kinetics722", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()]
    assert ["k722_val", "4", "69,692", "4", "0", "0", "0", "0"] in rows
    assert ["k722_train", "3", "~629,300", "4", "0", "1", "0", "0"] in rows
    assert "in k400_val too, as in the official list: 1; --filter-k400 drops them" in done.output


# ----------------------------------------------------------------------------------------------- opening every file


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Real videos, but for one that is in two lists, one empty file and one without pictures."""
    write_video(tmp_path / "one.mp4", [10, 20, 30])
    on_disk(tmp_path, tree_of(k600_train={"zumba": ["broken", "fine"]}), (tmp_path / "one.mp4").read_bytes())
    (tmp_path / "k600/train/zumba" / file("broken")).write_bytes(b"no video")
    (tmp_path / "k700/train/zumba" / file("broken")).write_bytes((tmp_path / "one.mp4").read_bytes())
    (tmp_path / "k400/val/zumba" / file("empty")).touch()
    (tmp_path / "k400/val/zumba" / f"{file('text')}").write_text("1\n00:00:00,000 --> 00:00:01,000\nsubtitles\n")
    return tmp_path


def test_files_that_do_not_open_are_listed_apart(videos: Path) -> None:
    made = made_of(videos, check=True)
    out = videos / "out"
    broken = f"k600/train/zumba/{file('broken')}"
    for name in ("k600_train", "k722_train"):
        assert [line.split("\t") for line in lines(out / f"{name}_error.txt")] == [
            [broken, "Invalid data found when processing input"]
        ]
        assert not any(line.startswith(broken) for line in lines(out / f"{name}.txt"))
        assert any(line.startswith(f"k600/train/zumba/{file('fine')}") for line in lines(out / f"{name}.txt"))
    # its copy does not take its place, as in the official lists
    assert not any("broken" in line for line in lines(out / "k722_train.txt"))
    assert [line.split("\t") for line in lines(out / "k400_val_error.txt")] == [
        [f"k400/val/zumba/{file('empty')}", "Invalid data found when processing input"],
        [f"k400/val/zumba/{file('text')}", "it has no pictures"],
    ]
    assert lines(out / "k400_val.txt") == [f"k400/val/zumba/{file('own-k400v')} 0"]
    assert not (out / "k700_train_error.txt").exists()
    assert "every one of 11 files was opened once; 3 do not open" in made.notes

    made_of(videos, check=True)  # the same again: nothing else is there
    with pytest.raises(ConfigError, match="--overwrite"):
        made_of(videos)
    made_of(videos, overwrite=True)
    assert not list(out.glob("*_error.txt"))


def test_an_interrupted_check_keeps_what_it_found(videos: Path) -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "opening every file" and done == last:
            assert lines(videos / "out/k400_val.txt")  # written before
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    last = 3
    with pytest.raises(KeyboardInterrupt):
        made_of(videos, check=True, watch=interrupt)
    report = (videos / "out/report.md").read_text()
    assert "opening every file was interrupted after 3 of 11" in report
    assert not list((videos / "out").glob(".*"))
    assert "every one of 11 files was opened once; 3 do not open" in made_of(videos, check=True).notes

    (videos / "k600/train/zumba" / file("broken")).write_bytes((videos / "one.mp4").read_bytes())
    last = 1  # what an earlier check found stays, until it is found to be otherwise
    with pytest.raises(KeyboardInterrupt):
        made_of(videos, check=True, watch=interrupt)
    assert "interrupted after 1 of 11; 3 are known not to open" in (videos / "out/report.md").read_text()
    assert len(lines(videos / "out/k400_val_error.txt")) == 2
    assert "every one of 11 files was opened once; 2 do not open" in made_of(videos, check=True).notes
    assert not (videos / "out/k600_train_error.txt").exists()


def crash(path: str) -> str:
    if "crash" in path:
        os._exit(1)
    return "bad" if "bad" in path else ""


def test_a_file_that_ends_its_process_is_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinetics722, "opening_problem", crash)
    found = dict(check(["good 1", "crash", "bad", "good 2"], 1))
    assert "crashed" in found.pop("crash")
    assert found == {"good 1": "", "bad": "bad", "good 2": ""}
