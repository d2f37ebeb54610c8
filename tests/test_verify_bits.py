"""make verify-bits fails if a bit differs."""

import json

import pytest

import verify_bits


@pytest.fixture
def verify(monkeypatch, tmp_path):
    """Run the program with made-up digests, of which one case's may change, and return its exit status."""

    def run(*arguments: str, digest: str = "a" * 64) -> int:
        monkeypatch.setattr("sys.argv", ["verify_bits.py", *arguments])
        monkeypatch.setattr(
            verify_bits, "train", lambda root, data, name: digest if name == "MiniImagenet" else "b" * 64
        )
        with pytest.raises(SystemExit) as ended:
            verify_bits.main()
        return ended.value.code

    monkeypatch.setattr(verify_bits, "RECORD", tmp_path / "bits.json")
    monkeypatch.setattr(verify_bits, "generate", lambda folder: None)
    return run


def test_a_differing_digest_is_an_error(verify):
    assert verify("--record") == 0
    assert verify() == 0
    assert verify(digest="c" * 64) == 1
    assert verify("--only=sinusoid", digest="c" * 64) == 0


def test_a_machine_without_a_record_is_not_an_error(verify):
    verify_bits.RECORD.write_text(json.dumps({"another machine": {}}))
    assert verify() == 0
