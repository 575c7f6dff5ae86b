"""The configuration: two JSON files and a command line become one checked `TrainConfig`."""

from trainer.config.load import Loaded, load_config
from trainer.config.optimizer_rules import check_fused_backward, check_rates, check_schedules
from trainer.config.resolved import FORMAT, clip_skip_of_format_1, flattened, without_folders, write_resolved
from trainer.config.schema import OptimizerConfig, TrainConfig

__all__ = [
    "FORMAT",
    "Loaded",
    "OptimizerConfig",
    "TrainConfig",
    "check_fused_backward",
    "check_rates",
    "check_schedules",
    "clip_skip_of_format_1",
    "flattened",
    "load_config",
    "without_folders",
    "write_resolved",
]
