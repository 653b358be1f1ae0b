"""What the tests stand on."""

from concurrent.futures import ThreadPoolExecutor

from support.trial import Trial, trial_of


def test_a_trial_runs_once_for_all_that_wait(tmp_path):
    code = f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); import time; time.sleep(0.3); print(1 / 0)"
    with ThreadPoolExecutor(4) as workers:
        trials = list(workers.map(lambda _: trial_of([code], tmp_path, 20), range(4)))
    assert (tmp_path / "runs").read_text() == "x"
    assert len(set(trials)) == 1 and trials[0].returncode == 1 and "ZeroDivisionError" in trials[0].stderr


def test_a_trial_that_hangs_ends(tmp_path):
    hangs = "while True: pass"
    assert trial_of([hangs], tmp_path, 0.5) == Trial(1, "it took more than 0.5 s") == trial_of([hangs], tmp_path, 0.5)


def test_trials_run_side_by_side_and_one_that_fails_is_told(tmp_path):
    """Each of two codes ends when the other one has begun."""
    wait = "import time, pathlib\nwhile not pathlib.Path({other!r}).exists(): time.sleep(0.05)"
    places = [str(tmp_path / name) for name in "ab"]
    codes = [f"open({own!r}, 'w')\n" + wait.format(other=other) for own, other in (places, places[::-1])]
    with ThreadPoolExecutor(2) as workers:
        assert list(workers.map(lambda _: trial_of(codes, tmp_path, 20), range(2))) == [Trial(0, "")] * 2
    assert trial_of([*codes, "1 / 0"], tmp_path, 20).returncode == 1
