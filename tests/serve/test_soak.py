"""Some seconds of the soak on a tiny model; ``make soak`` runs it for longer."""

from pathlib import Path

from serve.soak import VISITS, soak
from support.chat_models import write_tool_model


def test_clients_of_all_kinds_leave_the_server_well(tmp_path: Path) -> None:
    model = write_tool_model(tmp_path / "tiny", max_position_embeddings=8192)
    report = soak(str(model), 5.0, tmp_path, cache_mib=24)
    assert report.failures == []
    assert report.done.keys() == {visit.__name__ for visit in VISITS}
