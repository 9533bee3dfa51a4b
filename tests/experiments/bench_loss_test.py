"""The table of the loss's memory, at sizes that compile in no time."""

import pytest

from experiments import bench_loss


@pytest.mark.slow
def test_the_chunked_loss_needs_a_share_of_what_all_logits_do(monkeypatch, tmp_path, capsys):
  for name, value in {
    "VOCABULARIES": (512, 2048), "LENGTHS": (512,), "WIDTHS": (16, 20), "REAL_ROWS": 2,
    "REAL_WIDTHS": (24, 28), "KINDS": {"reverse_kl": {"divergence": "reverse_kl"}},
  }.items():
    monkeypatch.setattr(bench_loss, name, value)
  bench_loss.main(["bench_loss", f"--out={tmp_path / 'memory.md'}"])
  text = (tmp_path / "memory.md").read_text(encoding="utf-8")
  assert capsys.readouterr().out.strip() == text.strip()
  rows = [line.split("|") for line in text.splitlines() if line.startswith("| 4 ")]
  formula, dense, chunked = (float(cell.replace(",", "")) for cell in rows[1][5:8])
  assert formula == 3 * 4 * 4 * 512 * 2048 / 2**20
  assert dense >= formula > 5 * chunked
  assert "One device of fsdp 2 tensor 2 sequence 2" in text
