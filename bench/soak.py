"""Training that is killed all the time, for an hour or so; too long for test_exsvd.py, whose helpers it uses:

    python -m pytest -s bench/soak.py
"""

import contextlib
import os
import resource
import sys
import time

import numpy as np
import psutil

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from test_exsvd import TWO, launch, nodes_at_work, same_state, small, start_nodes, untimed, videos


def test_a_killed_node_ends_the_other_and_the_run_goes_on(small, videos, tmp_path):
    args, run = ("--model", small, "--data", videos, *TWO), tmp_path / "run"
    node, lost, other = nodes_at_work(run, *args, "--out", run, "--steps", 1000)
    for p in lost:
        p.kill()
    text = node.communicate(timeout=60)[0]
    other.communicate()
    assert node.returncode != 0 and "another rank is gone" in text, text
    steps = max(int(p.name[6:]) for p in run.glob("state-*")) + 1
    for out in (run, tmp_path / "straight"):
        nodes = start_nodes(*args, "--out", out, "--steps", steps)
        texts = [node.communicate()[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], texts
    assert same_state(run, tmp_path / "straight", steps)


def test_a_run_that_is_killed_all_the_time(small, videos, tmp_path):
    """300 steps on two ranks; SIGKILL of a random rank about every 15 seconds, a disk that is full for one start, a
    damaged state: the same bits, and the same log, as a run that nothing happens to."""
    args = ("--model", small, "--data", videos, *TWO, "--steps", 300, "--save-every", 3, "--keep", 3, "--log-every", 7)
    out, rng, kills, damaged = tmp_path / "run", np.random.default_rng(0), 0, None

    def nothing_over_100_kB():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    while True:
        full = kills == 9
        p = launch(*args, "--out", out, ranks=2, wait=False, preexec_fn=nothing_over_100_kB if full else None)
        before, ranks, waits = set(out.glob("state-*")), [], rng.uniform(5, 25)
        while p.poll() is None and len(ranks) < 2:
            with contextlib.suppress(psutil.NoSuchProcess):  # the launcher has short-lived children too
                ranks = [rank for launcher in psutil.Process(p.pid).children() for rank in launcher.children()]
            time.sleep(0.1)
        if kills % 2 and not full:  # else it is killed wherever it is, while it starts perhaps
            while p.poll() is None and set(out.glob("state-*")) <= before:
                time.sleep(0.1)
            waits = rng.uniform(0, 15)
        until = time.monotonic() + waits
        while p.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        if p.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                ranks[rng.integers(2)].kill()
            kills += 1
        text = p.communicate()[0]
        states = sorted(out.glob("state-*"))
        print(f"kill {kills}: states {[int(s.name[6:]) for s in states]}", "disk full" if full else "", damaged or "")
        assert damaged is None or "is damaged and passed over" in text, text
        if p.returncode == 0:
            break
        damaged = None
        if kills == 13:  # the next one waits for a state, and so reads this one first
            damaged = sorted(states[-1].glob("rank-*"))[0]
            damaged.write_bytes(damaged.read_bytes()[:-1000])
    p = launch(*args, "--out", tmp_path / "straight", ranks=2)
    assert p.returncode == 0 and kills >= 20, (kills, p.stdout)
    assert same_state(tmp_path / "run", tmp_path / "straight", 300)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")
