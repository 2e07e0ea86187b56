import copy

from hmoe.eval.loading import Checkpoint, check_same_tokenizer


def test_tokenizers_and_steps_are_recognised(tokenizer, tmp_path):
    check_same_tokenizer(tokenizer, copy.deepcopy(tokenizer), ("a", "b"))
    (tmp_path / "trainer_state.json").write_text('{"global_step": 42}')
    assert Checkpoint(str(tmp_path)).step == 42
    assert Checkpoint(str(tmp_path / "hmoe" / "checkpoint-600")).step == 600
    assert Checkpoint(str(tmp_path / "hmoe")).step is None
