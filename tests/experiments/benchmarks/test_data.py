import sys

from experiments.benchmarks import data as benchmark_data
from tests.data import pictures


def test_benchmark_says_what_was_measured_where(tmp_path, monkeypatch, capsys):
    pictures.write_folder(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data", "--data_path=/a/b/imagenet", "--seconds=0.05"])
    results = benchmark_data.benchmark(str(tmp_path), image_size=32, seconds=0.05)
    assert results["command"].endswith(" --data_path=imagenet --seconds=0.05")
    assert results["images"] == "18 files, median 44x56"
    assert results["commit"] and results["hardware"] and set(results["versions"]) >= {"python", "grain", "pillow"}
    assert len(results["rates"]) == 3
    printed = capsys.readouterr().out
    for rate in results["rates"]:
        assert rate["images"] >= 3 * 3 and rate["images_per_second"] > 0 and rate["image_size"] == 32
        assert f"by the clock: {rate['pipeline']}" in printed


def test_processor_time_and_clock_count_what_they_say(monkeypatch):
    """A pipeline that computes for 2 s and waits for 2 s per batch of 16, on clocks of our own."""
    now = {"clock": 0.0, "processor": 0.0}
    monkeypatch.setattr(benchmark_data.time, "perf_counter", lambda: now["clock"])
    monkeypatch.setattr(benchmark_data.time, "process_time", lambda: now["processor"])

    def stream():
        while True:
            now["clock"] += 4.0
            now["processor"] += 2.0
            yield {"label": [0] * 16}

    rate = benchmark_data.measure(stream, seconds=10.0)
    assert rate["images"] == 3 * 3 * 16  # three batches of 4 s pass 10 s
    assert (rate["images_per_second"], rate["images_per_core_second"]) == (4, 8)
