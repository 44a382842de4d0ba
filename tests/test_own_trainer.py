"""RankingReward in somebody's own GRPOTrainer, as the README shows it."""

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from vqr1 import RankingReward, format_reward, load_policy, load_ratings
from vqr1.data import pictures_of, prompt_rows


def test_the_reward_trains_in_a_trainer_that_is_not_ours(tmp_path):
    model, processor = load_policy("tiny-policy")[:2]
    before = model.lm_head.weight.detach().clone()
    rows = load_ratings("sim-kadid").query("split == 'train'").sample(24, random_state=0)
    args = GRPOConfig(
        str(tmp_path),
        max_steps=2,
        num_generations=6,
        per_device_train_batch_size=24,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=[RankingReward(args.num_generations), format_reward],
        train_dataset=prompt_rows(rows, pictures_of(rows)),
        args=args,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2
    for log in logs:
        assert 0 < log["rewards/ranking/mean"] <= 1.002 and 0 <= log["rewards/format_reward/mean"] <= 1
        parts = (log[f"rewards/{name}/mean"] for name in ("ranking", "format_reward"))
        assert log["reward"] == pytest.approx(sum(parts), abs=1e-5)
    assert not torch.equal(model.lm_head.weight, before)
