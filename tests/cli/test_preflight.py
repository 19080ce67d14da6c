"""What would stop a search halfway is said before it starts, each in one line with its remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from timm.models import save_for_hf

from carmodels.demo.folder import DEMO_WEIGHTS
from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.study import Study
from tune import search
from tune.cli import preflight, session
from tune.cli.preflight import findings
from tune.runtime import cluster
from tune.runtime import findings as machine_findings
from tune.runtime.findings import Finding
from tune.runtime.job import Workers

ROOT = Path(__file__).parents[2]
SPACE = SPACES["gpu"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with everything that a search wants."""
    plenty(monkeypatch)


def plenty(
    patch: pytest.MonkeyPatch,
    *,
    disk: float = 1e12,
    shared: float = 1e10,
    memory: float = 1e11,
    files: tuple[int, int] = (65536, 65536),
    processes: tuple[tuple[str, int], ...] = (),
) -> None:
    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=shared if str(folder) == "/dev/shm" else disk)

    running = [
        SimpleNamespace(info={"pid": 4000 + n, "ppid": 1, "name": name, "uids": SimpleNamespace(real=uid)})
        for n, (name, uid) in enumerate(processes)
    ]
    patch.setattr(preflight.shutil, "disk_usage", usage)
    patch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    patch.setattr(preflight, "_container_memory", lambda: float("inf"))
    patch.setattr(machine_findings.resource, "getrlimit", lambda kind: files)
    patch.setattr(preflight.psutil, "process_iter", lambda wanted: running)


def found(tmp_path: Path) -> list[Finding]:
    return findings(Study(tmp_path / "results" / "a"), SPACE, Workers(4, 1, 0.0), tmp_path / "cache", later=5)


def test_loader_processes_of_a_gpu_need_room_in_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty(monkeypatch, shared=64e6)
    workers = Workers(1, 16, 1.0)
    [said] = findings(Study(tmp_path / "results" / "a"), SPACE, workers, tmp_path / "cache", later=5)
    each = 2 * 2 * 32 * 3 * SPACE.largest_size**2  # two batches ready, val's are twice as large
    assert said == Finding(
        "/dev/shm has 0.06 GB free, loader processes hand over images there and need "
        f"{15 * each / 1e9:.2f} GB; in a container: --shm-size=3g",
        fatal=True,
    )
    drawn = SPACE.with_override("batch_size=16,64")
    [more] = findings(Study(tmp_path / "results" / "a"), drawn, workers, tmp_path / "cache", later=5)
    assert f"need {30 * each / 1e9:.2f} GB" in more.words  # of the largest batch that is drawn
    sharing = Workers(1, 16, 1.0, packed=4)  # trials share the cores, too
    assert findings(Study(tmp_path / "results" / "a"), SPACE, sharing, tmp_path / "cache", later=5) == [said]
    plenty(monkeypatch, shared=3e9)
    assert findings(Study(tmp_path / "results" / "a"), SPACE, workers, tmp_path / "cache", later=5) == []


def test_a_machine_in_order_gives_no_finding(tmp_path: Path) -> None:
    assert found(tmp_path) == []
    assert not (tmp_path / "results" / "a").exists()


@pytest.mark.parametrize(
    ("scarce", "words", "fatal"),
    [
        (
            {"disk": 1e9},
            "--results {results}: 1.0 GB are free, about 6.4 GB are needed; make room or give another folder",
            True,
        ),
        (
            {"memory": 3.2e9},
            "3.2 GB of memory are free for 4 workers, which take about 6.0 GB; --workers 2 is safer",
            False,
        ),
        (
            {"shared": 64e6},
            "/dev/shm has 0.06 GB free, Ray wants 0.3 GB and will use the disk instead; "
            "in a container: --shm-size=1g",
            False,
        ),
        ({"files": (256, 65536)}, "256 files may be open at a time, Ray needs 1024: ulimit -n 1024", True),
        (
            {"files": (256, 512)},
            "256 files may be open at a time, Ray needs 1024: ask the administrator for more",
            True,
        ),
        (
            {"processes": (("raylet", os.getuid()), ("raylet", os.getuid() + 1), ("python", os.getuid()))},
            "another Ray is running here (process 4000) and will share the machine with this search; "
            "`ray stop` ends it if it was left behind",
            False,
        ),
    ],
)
def test_each_shortage_is_one_line_with_its_remedy(
    scarce: dict[str, object], words: str, fatal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty(monkeypatch, **scarce)  # type: ignore[arg-type]
    assert found(tmp_path) == [Finding(words.format(results=tmp_path / "results"), fatal)]


@pytest.mark.server
def test_another_search_on_this_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that looks like one, as the parent of a Ray."""
    script = tmp_path / "tune" / "search.py"
    script.parent.mkdir()
    script.write_text("print(flush=True); input()")
    command = [sys.executable, str(script), "--study", "vans"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()  # until it runs its name is still ours
    uids = SimpleNamespace(real=os.getuid())
    raylet = SimpleNamespace(info={"pid": 4000, "ppid": other.pid, "name": "raylet", "uids": uids})
    monkeypatch.setattr(preflight.psutil, "process_iter", lambda wanted: [raylet])
    found_now = found(tmp_path)
    other.communicate(b"\n")
    assert found_now == [
        Finding(
            f"another search is running here (process {other.pid}, study vans) and takes the same cores and "
            "GPUs; wait for its end, or give each its own with --workers and CUDA_VISIBLE_DEVICES"
        )
    ]


@pytest.mark.parametrize(("name", "option"), [("results", "--results"), ("cache", "--cache")])
def test_a_folder_that_cannot_be_written_to_is_named(name: str, option: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a file in the place of the folder")
    [finding] = found(tmp_path)
    assert finding.fatal
    assert finding.words.startswith(f"{option} {tmp_path / name}: no writing there (")
    assert finding.words.endswith("); give a folder of your own")


def test_room_that_the_study_has_taken_already_is_not_asked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty(monkeypatch, disk=1e9)
    weights = Study(tmp_path / "results" / "a").weights_file("x")
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert len(found(tmp_path)) == 1
    os.truncate(weights, 6 * 10**9)  # takes no room of its own
    assert found(tmp_path) == []


def test_what_is_fatal_comes_first_and_a_clusters_memory_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty(monkeypatch, memory=1e9, disk=1e6)
    assert [f.fatal for f in found(tmp_path)] == [True, False]
    [only] = findings(Study(tmp_path / "a"), SPACE, None, tmp_path, later=5)
    assert only.fatal


# ---- one process a study


def test_a_study_in_use_is_refused_and_its_process_named(tmp_path: Path) -> None:
    study = Study(tmp_path / "results" / "cars")
    other = Study(tmp_path / "results" / "vans")
    refused = rf"cars is in use by process {os.getpid()} on \S+; wait for its end, stop it, or give another"
    with (
        session.held(study),
        session.held(other),
        pytest.raises(ValueError, match=refused),
        session.held(study),
    ):
        pass
    with session.held(study):
        pass


@pytest.mark.server
def test_a_study_whose_process_was_killed_is_free_again(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from carmodels.study import Study; from tune.cli import session\n"
        "hold = session.held(Study(Path(sys.argv[1]))); hold.__enter__(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "cars")], cwd=ROOT, check=False)
    assert killed.returncode == -9
    with session.held(Study(tmp_path / "cars")):
        pass


def test_a_machine_of_a_cluster_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(marker: Path, versions: dict[str, str]) -> list[Finding]:
        shared = {"--data": tmp_path / "cars", "--weights": tmp_path}
        return cluster._on_this_machine(marker, shared, tmp_path / "cache", versions)

    marker, same = tmp_path / "marker", cluster._versions()
    assert here(marker, same) == [
        Finding(
            f"--results {tmp_path} is not the folder that the search sees; give one that all machines share",
            fatal=True,
        )
    ]
    marker.touch()
    lacking = Finding(
        f"--data {tmp_path / 'cars'} is not there; share it, or put a copy at the same path", fatal=True
    )
    assert here(marker, same) == [lacking]
    words = f"timm is {same['timm']} there and 0.1 here; install the same"
    assert here(marker, {**same, "timm": "0.1"}) == [lacking, Finding(words)]
    plenty(monkeypatch, files=(64, 64))
    assert here(marker, same)[-1].words.startswith("64 files may be open at a time")


def test_check_looks_at_everything_and_starts_nothing(
    drawn: Path,
    tmp_path: Path,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.undo()  # the machine as it is
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    places = ("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"))
    given = ("--data", str(drawn), "--weights", weights.source, "--preset", "demo", *places)
    assert search.main([*given, "--check"]) == 0
    output = capsys.readouterr().out
    assert "Checked: data, weights, space, folders, disk, memory. Nothing stands in the way." in output
    assert not list(tmp_path.glob("results/*"))


def test_a_backbone_without_a_row_is_checked_with_its_sizes_and_its_licence(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the machine as it is
    monkeypatch.setenv("COLUMNS", "150")
    network = timm.create_model("test_vit", num_classes=7)
    licence = {"pretrained_cfg": {"license": "cc-by-nc-4.0"}}
    save_for_hf(network, tmp_path / "own", model_config=licence, safe_serialization=True)
    places = ("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"))
    given = ("--data", str(drawn), "--weights", str(DEMO_WEIGHTS), "--preset", "demo", *places, "--check")
    backbones = f"backbone=test_resnet,{tmp_path / 'own'}"
    assert search.main([*given, "--set", backbones, "--set", "image_size=40,64"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "own takes images of 32, 64 px." in output
    assert "own: the licence of its weights, cc-by-nc-4.0, forbids commercial use." in output
    assert "test_resnet takes" not in output
