"""The quick form of stress.py: what the trainer and the ops survive."""

import stress


def test_kills_alterations_and_faults_are_survived(seed, capsys):
    wrong = stress.main(["--quick", "--seed", str(seed)])
    assert wrong == 0, capsys.readouterr().out
