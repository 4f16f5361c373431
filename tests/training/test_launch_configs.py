"""The configurations for `accelerate launch` are what accelerate reads."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
PROCESSES = {"1gpu": 1, "8gpu-ddp": 8, "8gpu-fsdp2": 8, "64gpu-fsdp2": 64}


def test_every_file_is_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_configuration_is_read(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == PROCESSES[name]
    assert config.num_processes % config.num_machines == 0
    assert config.mixed_precision == "bf16"
    if "fsdp2" in name:
        assert config.fsdp_config["fsdp_version"] == 2
        # A checkpoint that any number of processes loads.
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_fsdp_settings_have_names_that_accelerate_knows():
    from accelerate.commands.launch import launch_command_parser

    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    for path in FOLDER.glob("*.yaml"):
        assert set(load_config_from_file(str(path)).fsdp_config or {}) <= known
