"""engine/costs.py: energy from the hardware's own counters, and what processes counted, as one."""

import gc
import sys
import threading
from types import SimpleNamespace

import bench
import pytest
import torch

import eval as evaluation
import train
from engine import costs, files, metrics

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def counter(folder, name, energy, number=0, span=999_999):
    zone = folder / f"intel-rapl:{number}"
    zone.mkdir(exist_ok=True)
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", span)):
        (zone / file).write_text(f"{text}\n")


def test_energy_is_the_packages_own_count_also_when_it_starts_again(tmp_path):
    counter(tmp_path, "package-0", 900_000)
    counter(tmp_path, "package-1", 0, 1)
    counter(tmp_path, "dram", 0, 2)
    energy = costs.Energy(CPU, tmp_path)
    assert energy.source == "RAPL" and energy.watt_hours() == 0
    counter(tmp_path, "package-0", 100_000)  # 200,000 later
    counter(tmp_path, "package-1", 700_000, 1)
    counter(tmp_path, "dram", 999, 2)
    assert energy.watt_hours() == pytest.approx(0.9 / 3600) == energy.watt_hours()
    energy.close()


def test_where_nothing_counts_energy_there_is_no_figure(tmp_path):
    energy = costs.Energy(CPU, tmp_path)
    assert energy.source is None and energy.watt_hours() is None


@pytest.fixture
def nvml(monkeypatch):
    """A GPU whose counter gives the millijoules of this list, one at each reading; from then on it fails."""
    readings = []

    def read(handle):
        if not readings:
            raise RuntimeError("Not Supported")  # pynvml's own kind of error, as virtual GPUs give it
        return readings.pop(0)

    library = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
                              nvmlDeviceGetTotalEnergyConsumption=read)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    return readings


def test_a_gpus_energy_is_the_difference_of_its_counter(nvml, tmp_path):
    counter(tmp_path, "package-0", 0)
    nvml += [5_000, 5_000, 3_605_000]
    energy = costs.Energy(GPU, tmp_path)
    assert energy.source == "NVML" and energy.watt_hours() == 0 and energy.watt_hours() == 1


def test_a_gpu_without_an_energy_counter_gives_no_figure(nvml, tmp_path):
    counter(tmp_path, "package-0", 0)
    energy = costs.Energy(GPU, tmp_path)
    assert energy.source is None and energy.watt_hours() is None


def test_once_a_counter_has_failed_there_is_no_figure_for_that_time(nvml):
    nvml += [0, 0, 1_000]
    energy = costs.Energy(GPU)
    counts = costs.Counts(CPU, energy)
    assert counts.totals()["energy_wh"] == pytest.approx(1 / 3600)
    assert counts.totals()["energy_wh"] is None
    nvml += [2_000] * 3  # it counts again, but what came between is not known
    assert counts.totals()["energy_wh"] is None and costs.Counts(CPU, energy).totals()["energy_wh"] is None


def test_a_package_that_cannot_be_read_any_more_gives_no_figure(tmp_path):
    counter(tmp_path, "package-0", 0)
    counter(tmp_path, "package-1", 0, 1)
    energy = costs.Energy(CPU, tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert energy.watt_hours() is None
    energy.close()


def test_a_run_whose_energy_is_known_in_part_has_no_total():
    line = dict.fromkeys(("train_seconds", "cam_seconds", "eval_seconds", "images_seen", "erased_images",
                          "second_pass_images", "optimizer_steps", "skipped_steps", "peak_gpu_allocated_mb",
                          "peak_gpu_reserved_mb", "peak_host_mb"), 1)
    known, unknown = line | {"energy_wh": 0.5}, line | {"energy_wh": None}
    assert metrics.costs([known, known], 0)["energy_wh"] == 1
    assert metrics.costs([known, unknown], 0)["energy_wh"] is None


def test_of_processes_that_share_packages_the_first_counts_them(tmp_path):
    counter(tmp_path, "package-0", 0)
    first, second = (costs.Energy(CPU, tmp_path, first) for first in (True, False))
    counts = [costs.Counts(CPU, energy) for energy in (first, second)]
    counter(tmp_path, "package-0", 720_000)
    every = [each.so_far() for each in counts]
    assert second.source is None and costs.merged(every)["energy_wh"] == pytest.approx(0.0002)
    assert costs.merged([every[0], every[1] | {"energy_wh": None}])["energy_wh"] is None
    first.close()


def test_a_counter_that_other_runs_share_is_not_read(nvml, tmp_path, monkeypatch):
    counter(tmp_path, "package-0", 0)
    nvml += [0] * 10
    for shared, expected in (({"RAPL"}, ["NVML", None]), ({"RAPL", "NVML"}, [None, None])):
        monkeypatch.setattr(costs.Energy, "shared", frozenset(shared))
        assert [costs.Energy(device, tmp_path).source for device in (GPU, CPU)] == expected


def readers():
    """Threads that read RAPL; those that are about to end have ended."""
    gc.collect()
    found = [thread for thread in threading.enumerate() if thread.name == "RAPL"]
    for thread in found:
        thread.join(1)
    return [thread for thread in found if thread.is_alive()]


def test_a_reader_ends_when_it_is_closed_and_when_nobody_has_it(tmp_path):
    counter(tmp_path, "package-0", 0)
    energy = costs.Energy(CPU, tmp_path)
    assert len(readers()) == 1
    energy.close()
    assert not readers()
    energy = costs.Energy(CPU, tmp_path)
    assert len(readers()) == 1
    del energy
    assert not readers()


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A machine with a counter of its packages."""
    counter(tmp_path, "package-0", 0)
    monkeypatch.setattr(costs.Energy.__init__, "__defaults__", (tmp_path, True))


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--mode", "staged", "--rounds", "1"]], ids=["online", "staged"])
def test_no_program_leaves_a_reader_behind(how, counted, trained, monkeypatch):
    folder = trained("--train-fraction", "0.1", *how, epochs=1)
    assert files.read_json(folder / "env.json")["energy"] == "RAPL"
    assert files.read_json(folder / "metrics.json")["cost"]["energy_wh"] == 0 and not readers()
    assert evaluation.main([str(folder)]) == 0 and not readers()


@pytest.mark.slow
def test_no_program_leaves_a_reader_behind_when_it_is_stopped(counted, tmp_path, monkeypatch):
    def stopped(*given):
        assert len(readers()) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "finish_epoch", stopped)
    assert train.main(["--train-fraction", "0.1", "--epochs", "1", "--out", str(tmp_path / "runs")]) == 130
    assert not readers()


@pytest.mark.slow
def test_the_benchmark_leaves_no_reader_behind(counted):
    small = ["--models", "test_resnet", "--image-size", "32", "--batch-size", "4", "--rounds", "1", "--images", "8"]
    assert bench.main(["train", *small, "--device", "cpu"]) == 0 and not readers()


def test_of_several_processes_work_adds_up_and_time_does_not(tmp_path):
    counted = [dict.fromkeys((*costs.Counts.ADDED, *costs.Counts.SHARED), value) for value in (2, 3)]
    found = costs.merged(counted)
    assert {found[key] for key in costs.Counts.ADDED} == {5} and {found[key] for key in costs.Counts.SHARED} == {3}


def test_an_epoch_that_was_interrupted_is_counted_on(tmp_path):
    energy = costs.Energy(CPU, tmp_path)
    before = costs.Counts(CPU, energy)
    before.misled(torch.tensor([True, False, True]), torch.tensor([True, True, False]))
    stopped = before.so_far()
    after = costs.Counts(CPU, energy, stopped)
    after.misled(torch.tensor([False, True]), torch.tensor([True, True]))
    totals = after.totals()
    assert totals["misled"] == pytest.approx(2 / 4) == 1 - totals["train_accuracy"] and totals["energy_wh"] is None
    assert totals["train_seconds"] >= stopped["train_seconds"] > 0


class Event:
    """As torch.cuda.Event, at a time in milliseconds; `clock` is what the GPU has come to."""

    clock = 0

    def __init__(self, time):
        self.time, self.read = time, 0

    def query(self):
        return self.time <= Event.clock

    def elapsed_time(self, end):
        assert end.query()
        self.read += 1
        return end.time - self.time


def test_each_time_of_a_gpu_is_added_once_and_only_when_it_is_over(tmp_path):
    counts = costs.Counts(CPU, costs.Energy(CPU, tmp_path))
    pairs = [(Event(begin), Event(begin + 10)) for begin in range(0, 100, 20)]
    counts.cam_events.extend(pairs)
    for Event.clock, expected in ((5, 0), (50, 0.03), (50, 0.03), (89, 0.04), (200, 0.05)):
        assert counts.so_far()["cam_seconds"] == pytest.approx(expected)
    assert [begin.read for begin, _ in pairs] == [1] * 5 and not counts.cam_events
