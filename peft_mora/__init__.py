"""New adapter types for PEFT, as a plugin: importing this package makes PEFT know them.

>>> from peft_mora import MoraConfig
>>> trainer = SFTTrainer(model=..., peft_config=MoraConfig(r=16, target_modules="all-linear"))
"""

from . import registry


try:
    from .flylora import FlyLoraConfig, FlyLoraLinear, FlyLoraModel
    from .furina import FurinaConfig, FurinaLinear, FurinaModel
    from .lori import LoriConfig, LoriLinear, LoriModel
    from .mora import MoraConfig, MoraLinear, MoraModel, TaskSummary, start_task
    from .mtl_lora import MtlLoraConfig, MtlLoraLinear, MtlLoraModel, set_task
    from .pruning import PruneSummary, prune_experts
    from .quantization import use_exact_4bit_kernels
    from .smora import SMoraConfig, SMoraLinear, SMoraModel
    from .sparsity import SparsitySummary, sparsify
    from .task_router import Routes, TaskRouter, TaskRouterConfig, TaskRouterModel
    from .usage import expert_usage, record_usage
except (ImportError, AttributeError) as error:
    raise registry.does_not_fit(error) from error

# A new method is a file and a row here: all lists of methods in messages, recipes and tests are made of these.
METHODS = {
    row.name: row
    for row in (
        registry.Method(MoraConfig, MoraModel),
        registry.Method(LoriConfig, LoriModel),
        registry.Method(FlyLoraConfig, FlyLoraModel),
        registry.Method(MtlLoraConfig, MtlLoraModel),
        registry.Method(SMoraConfig, SMoraModel),
        registry.Method(FurinaConfig, FurinaModel),
    )
}
for _method in METHODS.values():
    registry.register(*_method)
registry.register(TaskRouterConfig, TaskRouterModel, adapter=False)

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "FlyLoraConfig",
    "FlyLoraLinear",
    "FlyLoraModel",
    "FurinaConfig",
    "FurinaLinear",
    "FurinaModel",
    "LoriConfig",
    "LoriLinear",
    "LoriModel",
    "MoraConfig",
    "MoraLinear",
    "MoraModel",
    "MtlLoraConfig",
    "MtlLoraLinear",
    "MtlLoraModel",
    "PruneSummary",
    "Routes",
    "SMoraConfig",
    "SMoraLinear",
    "SMoraModel",
    "SparsitySummary",
    "TaskRouter",
    "TaskSummary",
    "expert_usage",
    "prune_experts",
    "record_usage",
    "set_task",
    "sparsify",
    "start_task",
    "use_exact_4bit_kernels",
]
