"""The feature store: content addresses, digests on read, the cache, the seal."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from avzero.data import columns
from avzero.data.avca import read_avca
from avzero.data.benchmark import AUDIO, VIDEO, Bool, Part, RawBenchmark, Role, Samples
from avzero.data.cache import NodeCache
from avzero.data.columns import copy_column, read_samples, value_extents, write_part
from avzero.data.ledger import Opening
from avzero.data.storage import LocalStorage, open_storage
from avzero.data.store import FeatureStore
from avzero.errors import UserError


@pytest.fixture(scope="module")
def raw(release: Path) -> RawBenchmark:
    return read_avca(release, "tiny", "main", name="tiny")


@pytest.fixture
def fresh(raw: RawBenchmark, tmp_path: Path) -> FeatureStore:
    """A store of one's own, with its own cache, that holds the tiny benchmark."""
    target = FeatureStore(str(tmp_path / "store"), NodeCache(tmp_path / "cache"))
    target.put(raw)
    return target


def blobs(store: FeatureStore) -> dict[str, Path]:
    manifest = store.manifest("tiny")
    root = Path(store.storage.url)
    return {name: root / entry["blob"] for name, entry in manifest["parts"].items()}


def big_part(rows: int, width: int) -> Part:
    rng = np.random.default_rng(0)
    names = tuple(f"s{i:06d}" for i in range(rows))
    flag: Bool = np.ones(rows, np.bool_)
    samples = Samples(
        names, np.arange(rows, dtype=np.int32), np.zeros(rows, np.int8), names, names, flag
    )
    return Part(samples, {AUDIO: rng.standard_normal((rows, width), dtype=np.float32)})


def test_what_goes_in_comes_out(raw: RawBenchmark, fresh: FeatureStore) -> None:
    benchmark = fresh.open("tiny")
    assert benchmark.info.digest == raw.digest()
    for modality in (AUDIO, VIDEO):
        array = benchmark.part.features[modality]
        np.testing.assert_array_equal(array, raw.open.features[modality])
        assert isinstance(array, np.memmap) and array.flags.c_contiguous and array.flags.aligned
    mine, theirs = benchmark.part.samples, raw.open.samples
    assert tuple(mine.sample_id) == tuple(theirs.sample_id)
    assert mine.sample_id[3] == theirs.sample_id[3]
    np.testing.assert_array_equal(mine.class_id, theirs.class_id)
    np.testing.assert_array_equal(mine.rows(Role.VAL_SEEN), theirs.rows(Role.VAL_SEEN))
    text = benchmark.info.text["w2v"]
    np.testing.assert_array_equal(text.vectors, raw.text["w2v"].vectors)
    assert text.key_of_class == raw.text["w2v"].key_of_class


def test_storing_twice_changes_nothing(raw: RawBenchmark, fresh: FeatureStore) -> None:
    before = {p: p.stat().st_mtime_ns for p in Path(fresh.storage.url).rglob("*") if p.is_file()}
    _, new = fresh.put(raw)
    after = {p: p.stat().st_mtime_ns for p in Path(fresh.storage.url).rglob("*") if p.is_file()}
    assert not new
    assert before == after


def test_manifest_is_written_last(
    raw: RawBenchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import cut off anywhere leaves no benchmark behind, and can be repeated."""
    target = FeatureStore(str(tmp_path / "store"), NodeCache(tmp_path / "cache"))
    write = LocalStorage.write

    def fail_on_manifest(self: LocalStorage, key: str, data: bytes) -> None:
        if key.startswith("benchmarks/"):
            raise KeyboardInterrupt
        write(self, key, data)

    monkeypatch.setattr(LocalStorage, "write", fail_on_manifest)
    with pytest.raises(KeyboardInterrupt):
        target.put(raw)
    assert target.manifests() == []
    monkeypatch.undo()
    assert target.put(raw)[1]
    assert not list(Path(target.storage.url).rglob(".tmp-*"))


def test_columns_are_ordinary_vectors(fresh: FeatureStore, raw: RawBenchmark) -> None:
    """Any Parquet reader sees one row per sample and fixed-size float lists."""
    table = pq.read_table(blobs(fresh)["open"])
    assert table.num_rows == len(raw.open.samples)
    assert str(table.schema.field("video").type) == "fixed_size_list<element: float>[48]"
    np.testing.assert_array_equal(table["audio"][5].as_py(), raw.open.features[AUDIO][5])
    assert set(table["role"].to_pylist()) == {"train", "val_seen", "val_unseen"}


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 3), (40_000, 5), (2_500, 4_096)])
def test_fast_path_equals_the_decoder(rows: int, width: int, tmp_path: Path) -> None:
    """Byte ranges and the Parquet decoder give the same matrix, over several row groups too."""
    part = big_part(rows, width)
    path = tmp_path / "part.parquet"
    write_part(path, part, lambda done, total: None)
    extents = value_extents(path, AUDIO, width)
    assert extents is not None
    with path.open("rb") as file:
        raw_bytes = b""
        for extent in extents:
            file.seek(extent.offset)
            raw_bytes += file.read(extent.size)
    assert raw_bytes == part.features[AUDIO].tobytes()
    decoded = b"".join(bytes(chunk) for chunk in columns._decoded_chunks(path, AUDIO))
    assert decoded == raw_bytes
    assert tuple(read_samples(path).sample_id) == part.samples.sample_id
    if rows > 16_384:
        assert pq.read_metadata(path).num_row_groups > 1


def test_decoder_reads_files_of_other_writers(tmp_path: Path) -> None:
    """A file rewritten with other settings has no raw ranges and is still read, digest checked."""
    from avzero.data.benchmark import array_digest

    part = big_part(500, 8)
    write_part(tmp_path / "a.parquet", part, lambda done, total: None)
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet", compression="zstd", row_group_size=120)
    pq.write_table(
        table, tmp_path / "c.parquet", compression="none", use_dictionary=False, data_page_size=512
    )
    digest = array_digest(part.features[AUDIO])
    for name in ("b", "c"):
        target = tmp_path / f"{name}.npy"
        copy_column(tmp_path / f"{name}.parquet", AUDIO, (500, 8), target, digest)
        np.testing.assert_array_equal(np.load(target), part.features[AUDIO])


def test_damage_is_found_on_read(fresh: FeatureStore) -> None:
    path = blobs(fresh)["open"]
    data = bytearray(path.read_bytes())
    extents = value_extents(path, VIDEO, 48)
    assert extents is not None
    data[extents[0].offset + 1234] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"column video does not have the content"):
        fresh.open("tiny")
    assert not list(fresh._cache.root.glob("*/video.npy"))
    problems = fresh.verify("tiny")
    assert len(problems) == 1 and path.stem[:12] in problems[0]


def test_missing_and_unreadable_blobs(fresh: FeatureStore) -> None:
    path = blobs(fresh)["open"]
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        fresh.open("tiny")
    path.unlink()
    with pytest.raises(UserError, match="missing although a manifest names it"):
        fresh.open("tiny")


def test_cache_is_used_repaired_and_shared(fresh: FeatureStore) -> None:
    first = fresh.open("tiny")
    for path in blobs(fresh).values():
        path.unlink()
    again = fresh.open("tiny")  # no blob needed any more
    np.testing.assert_array_equal(first.part.features[AUDIO], again.part.features[AUDIO])
    entry = next(fresh._cache.root.glob("*/audio.npy"))
    entry.write_bytes(entry.read_bytes()[:500])
    with pytest.raises(UserError, match="missing although a manifest names it"):
        fresh.open("tiny")  # a cut-off entry is not trusted; it would be filled again


def test_writing_to_the_array_does_not_change_the_cache(fresh: FeatureStore) -> None:
    array = fresh.open("tiny").part.features[AUDIO]
    before = float(array[0, 0])
    array[0, 0] = before + 1
    assert float(fresh.open("tiny").part.features[AUDIO][0, 0]) == before


def test_two_processes_fill_the_cache_at_once(fresh: FeatureStore) -> None:
    code = (
        "import sys; from pathlib import Path; from avzero.data.store import FeatureStore; "
        "from avzero.data.cache import NodeCache; "
        "b = FeatureStore(sys.argv[1], NodeCache(Path(sys.argv[2]))).open('tiny'); "
        "print(float(b.part.features['audio'].sum()))"
    )
    arguments = [sys.executable, "-c", code, fresh.storage.url, str(fresh._cache.root)]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate()[0] for process in running}
    assert len(printed) == 1 and all(process.returncode == 0 for process in running)


def test_test_rows_stay_sealed(fresh: FeatureStore, raw: RawBenchmark) -> None:
    """Opening a benchmark gives no TEST row; opening TEST leaves a line first."""
    samples = fresh.open("tiny").part.samples
    assert not set(samples.role.tolist()) & {Role.TEST_SEEN.code, Role.TEST_UNSEEN.code}
    assert not set(samples.sample_id) & set(raw.test.samples.sample_id)
    assert fresh.openings("tiny") == []
    digest = fresh.info("tiny").digest
    opening = Opening(digest, "avca", "w2v", "trial", "run", "frozen", 1.5, 7, "sweep", "revision")
    test = fresh.open_test(opening)
    assert len(test.part.samples) == 128
    (line,) = fresh.openings("tiny")
    assert (line["trial"], line["beta"], line["sweep"]) == ("trial", 1.5, "sweep")
    blobs(fresh)["test"].unlink()
    for cached in fresh._cache.root.glob("*/audio.npy"):
        cached.unlink()
    with pytest.raises(UserError):
        fresh.open_test(replace(opening, run="second"))
    assert len(fresh.openings("tiny")) == 2, "the line is written before the rows are read"


def test_storing_again_repairs(raw: RawBenchmark, fresh: FeatureStore) -> None:
    """What every message advises must work: ingesting again restores what is missing or cut."""
    manifest = fresh.manifest("tiny")
    entries = [*manifest["parts"].values(), *manifest["text"].values()]
    for entry in entries:
        path = Path(fresh.storage.url) / entry["blob"]
        path.unlink()
        assert fresh.verify("tiny")
        assert fresh.put(raw)[1] and fresh.verify("tiny") == []
        path.write_bytes(path.read_bytes()[:-3])
        assert fresh.put(raw)[1] and fresh.verify("tiny") == []
    assert fresh.open("tiny").info.digest == raw.digest()


def test_one_content_under_two_names(raw: RawBenchmark, fresh: FeatureStore) -> None:
    fresh.put(replace(raw, name="alias"))
    assert fresh.open(raw.digest()).info.digest == raw.digest()
    assert {m["name"] for m in fresh.manifests()} == {"tiny", "alias"}


def test_references(raw: RawBenchmark, fresh: FeatureStore) -> None:
    digest = raw.digest()
    for reference in ("tiny", f"tiny@{digest[:6]}", digest[:12]):
        assert fresh.info(reference).digest == digest
    with pytest.raises(UserError, match=r"no benchmark 'big'; there is tiny"):
        fresh.info("big")
    other = replace(raw, split="another")
    fresh.put(other)
    with pytest.raises(UserError, match="has 2 versions; write one of tiny@"):
        fresh.info("tiny")
    assert fresh.info(f"tiny@{other.digest()}").split == "another"


def test_audit_is_kept(fresh: FeatureStore, raw: RawBenchmark) -> None:
    assert fresh.audit("tiny") == json.loads(json.dumps(raw.audit))


def test_unwritable_and_unknown_places(raw: RawBenchmark, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        FeatureStore(str(tmp_path / "file" / "store")).put(raw)
    with pytest.raises(UserError, match="unknown kind of storage"):
        open_storage("ftp://host/x")
    with pytest.raises(ValueError, match="leaves the storage root"):
        LocalStorage(tmp_path).write("../outside", b"")


def test_full_device(raw: RawBenchmark, tmp_path: Path) -> None:
    """A real full file system: one clear line, nothing half-written, and space lets it pass."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(mount)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        target = FeatureStore(str(mount / "store"))
        with pytest.raises(UserError, match=r"free on the device|no space left"):
            target.put(raw)
        storage = LocalStorage(mount / "direct")
        with pytest.raises(UserError, match="no space left"):
            storage.write("a/b", b"x" * 400_000)
        assert storage.keys("") == [] and not list(mount.rglob(".tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(mount)], check=True)
        assert target.put(raw)[1]
    finally:
        subprocess.run(["umount", str(mount)], check=False)
