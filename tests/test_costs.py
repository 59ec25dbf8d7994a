"""engine/costs.py: energy from the hardware's own counters, and what processes counted, as one."""

import pytest
import torch

from engine import costs

CPU = torch.device("cpu")


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
