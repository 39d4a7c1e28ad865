from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprobe.cli import corpus as corpus_module
from torchprobe.cli.arguments import CommandError
from torchprobe.cli.corpus import Corpus, labelled_folder, passages_of, read_text, standard_library


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def assert_split_by_file(corpus: Corpus) -> None:
    train, held_out = set(corpus.train.files), set(corpus.held_out.files)
    assert train
    assert held_out
    assert not train & held_out
    for part in (corpus.train, corpus.held_out):
        assert len(part.passages) == len(part.labels)
        assert set(part.labels) == set(range(len(corpus.classes)))


class TestStandardLibrary:
    def test_every_machine_has_enough_packages_and_no_file_is_in_both_parts(self):
        corpus = standard_library(lines=10, seed=0)
        assert 8 <= len(corpus.classes) <= 10
        assert_split_by_file(corpus)
        assert len(corpus.train.passages) > 1000
        assert 0.1 <= corpus.majority_share < 0.3

    def test_the_seed_alone_decides(self):
        assert standard_library(lines=10, seed=3) == standard_library(lines=10, seed=3)
        assert standard_library(lines=10, seed=3).held_out.files != standard_library(lines=10, seed=4).held_out.files

    def test_the_answer_is_not_in_the_text(self):
        corpus = standard_library(lines=10, seed=0)
        for passage in corpus.held_out.passages:
            assert not any(name in passage.lower() for name in corpus.classes)

    def test_tests_and_stubs_are_left_out_and_thin_packages_are_no_class(self, tmp_path: Path):
        for package, files in (("json", 4), ("xml", 4), ("http", 2)):
            (tmp_path / package / "tests").mkdir(parents=True)
            (tmp_path / package / "tests" / "long.py").write_text("assert True\n" * 200)
            (tmp_path / package / "__init__.py").write_text("")
            for number in range(files):
                (tmp_path / package / f"{number}.py").write_text(f"value = {number}\n" * 200)
        corpus = standard_library(lines=10, seed=0, root=tmp_path)
        assert corpus.classes == ("json", "xml")
        names = {path.name for path in (*corpus.train.files, *corpus.held_out.files)}
        assert names == {"0.py", "1.py", "2.py", "3.py"}

    def test_a_python_without_its_source_is_told_what_to_do(self, tmp_path: Path):
        with pytest.raises(CommandError, match=r"no standard-library source under .*--data DIR"):
            standard_library(lines=10, seed=0, root=tmp_path)


class TestLabelledFolder:
    def test_class_sub_folders_are_split_by_file(self, texts: Path):
        corpus = labelled_folder(texts, lines=1, seed=0)
        assert corpus.classes == ("neg", "pos")
        assert_split_by_file(corpus)
        assert len(corpus.held_out.files) == 4

    def test_the_seed_alone_decides(self, texts: Path):
        assert labelled_folder(texts, lines=1, seed=5) == labelled_folder(texts, lines=1, seed=5)

    @pytest.mark.parametrize("held_out", ["test", "val"])
    def test_a_folder_that_is_split_already_keeps_its_split(self, tmp_path: Path, held_out: str):
        for part in ("train", held_out):
            for name in ("pos", "neg"):
                write(tmp_path / part / name, a=f"{part} {name}", b=f"{part} {name} again")
        write(tmp_path / "train" / "unsup", a="no label")
        corpus = labelled_folder(tmp_path, lines=1, seed=0)
        assert corpus.classes == ("neg", "pos")
        assert corpus.ignored == ("unsup",)
        assert {path.parts[-3] for path in corpus.train.files} == {"train"}
        assert {path.parts[-3] for path in corpus.held_out.files} == {held_out}

    def test_large_classes_are_drawn_from_down_to_a_limit(self, texts: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(corpus_module, "MAX_TRAIN_PASSAGES", 6)
        corpus = labelled_folder(texts, lines=1, seed=0)
        assert [corpus.train.labels.count(label) for label in (0, 1)] == [3, 3]
        assert len(corpus.train.files) == 6

    def test_the_majority_share_is_that_of_the_commonest_class(self, tmp_path: Path):
        write(tmp_path / "many", **{f"f{i}": "word" for i in range(12)})
        write(tmp_path / "few", **{f"f{i}": "word" for i in range(4)})
        assert labelled_folder(tmp_path, lines=1, seed=0).majority_share == pytest.approx(3 / 4)

    def test_hidden_and_binary_files_are_no_text(self, texts: Path):
        (texts / "pos" / "picture.png").write_bytes(b"\x89PNG\0\0")
        (texts / "pos" / ".DS_Store").write_text("x")
        (texts / ".git").mkdir()
        corpus = labelled_folder(texts, lines=1, seed=0)
        assert corpus.classes == ("neg", "pos")
        assert {path.suffix for path in (*corpus.train.files, *corpus.held_out.files)} == {".txt"}

    def test_no_such_folder(self, tmp_path: Path):
        with pytest.raises(CommandError, match=r"--data: '.*missing' is not a folder\. It takes a folder with one sub"):
            labelled_folder(tmp_path / "missing", lines=1, seed=0)

    def test_a_file_is_not_a_folder(self, tmp_path: Path):
        path = tmp_path / "reviews.csv"
        path.write_text("text")
        with pytest.raises(CommandError, match="is not a folder"):
            labelled_folder(path, lines=1, seed=0)

    def test_fewer_than_two_classes(self, tmp_path: Path):
        write(tmp_path / "pos", a="good")
        with pytest.raises(CommandError, match=r"fewer than two class sub-folders \(pos\).*DIR/pos and DIR/neg"):
            labelled_folder(tmp_path, lines=1, seed=0)

    @pytest.mark.parametrize("content", [{}, {"a": ""}, {"a": "the only one"}])
    def test_a_class_without_enough_text_is_named(self, texts: Path, content: dict[str, str]):
        write(texts / "meh", **content)
        with pytest.raises(CommandError, match=r"class 'meh' of '.*' has [01] text file\(s\), too few to split"):
            labelled_folder(texts, lines=1, seed=0)

    def test_train_and_test_without_a_common_class(self, tmp_path: Path):
        for folder in ("train/a", "train/b", "test/c", "test/d"):
            write(tmp_path / folder, x="text", y="text")
        with pytest.raises(CommandError, match="share fewer than two class sub-folders"):
            labelled_folder(tmp_path, lines=1, seed=0)


class TestPassages:
    def test_blank_lines_go_and_a_shorter_rest_is_left_out(self):
        assert list(passages_of("a\n\n  b  \nc\n\t\nd\ne\n", lines=2)) == ["a\n  b", "c\nd"]

    def test_a_text_shorter_than_a_passage_is_one(self):
        assert list(passages_of("a\nb\n", lines=10)) == ["a\nb"]

    @given(st.lists(st.text("ab \t", max_size=4)), st.integers(1, 6))
    def test_every_passage_has_the_length_asked_for_and_none_overlap(self, rows: list[str], lines: int):
        kept = [row.rstrip() for row in rows if row.strip()]
        passages = list(passages_of("\n".join(rows), lines))
        assert "\n".join(passages).split("\n") == (kept[: max(lines, len(kept) // lines * lines)] or [""])

    def test_bytes_that_are_not_utf8_are_replaced_not_fatal(self, tmp_path: Path):
        path = tmp_path / "latin1.txt"
        path.write_bytes("caf\xe9 au lait".encode("latin-1"))
        assert read_text(path) == "caf\N{REPLACEMENT CHARACTER} au lait"

    def test_only_the_first_mebibyte_of_a_file_is_read(self, tmp_path: Path):
        path = tmp_path / "huge.txt"
        path.write_text("x" * ((1 << 20) + 5))
        assert len(read_text(path)) == 1 << 20

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path):
        with pytest.raises(CommandError, match=r"cannot read .*gone\.txt"):
            read_text(tmp_path / "gone.txt")
