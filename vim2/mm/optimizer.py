"""Layer-wise learning rates for a ViM2 backbone, through the optimiser wrapper constructors of MMEngine."""

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

__all__ = ["ViM2LayerDecayOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ViM2LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that fall from the heads towards the stem, by a factor a layer, a block being a layer.

    Vectors (norms, biases, averaging weights) and the scans' parameters are not decayed. In a config:

        optim_wrapper = dict(
            constructor="ViM2LayerDecayOptimWrapperConstructor", paramwise_cfg=dict(layer_decay_rate=0.8)
        )

    Args:
        optim_wrapper_cfg: With the optimiser's lr and weight_decay.
        paramwise_cfg: layer_decay_rate, within (0, 1]; no other key.

    Raises:
        ValueError: Another key, a rate outside (0, 1], no lr, or a model whose backbone tells no layers.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if set(self.paramwise_cfg) != {"layer_decay_rate"}:
            raise ValueError(f"paramwise_cfg must hold layer_decay_rate alone, got {dict(self.paramwise_cfg)}.")
        self.rate = self.paramwise_cfg["layer_decay_rate"]
        if not 0 < self.rate <= 1:
            raise ValueError(f"layer_decay_rate must lie within (0, 1], got {self.rate}.")
        if self.base_lr is None:
            raise ValueError("The optimizer's config must hold lr.")

    def add_params(self, params: list[dict], module: nn.Module) -> None:
        """Append to `params` a group a layer and kind of decay of what `module` has to train."""
        backbone = getattr(module, "backbone", None)
        if not hasattr(backbone, "get_layer_depth"):
            raise ValueError(f"The model's backbone is a {type(backbone).__name__}, which does not tell its layers.")
        no_decay = {f"backbone.{name}" for name in backbone.no_weight_decay()}
        groups = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer, num_layers = backbone.get_layer_depth(name, "backbone.")
            decays = parameter.ndim > 1 and name not in no_decay
            if (layer, decays) not in groups:
                scale = self.rate ** (num_layers - 1 - layer)
                group = {"params": [], "lr": self.base_lr * scale, "lr_scale": scale}
                if self.base_wd is not None:
                    group["weight_decay"] = self.base_wd if decays else 0.0
                groups[layer, decays] = group
            groups[layer, decays]["params"].append(parameter)
        for (layer, decays), group in sorted(groups.items()):
            kind = "" if decays else ", not decayed"
            print_log(f"layer {layer}{kind}: {len(group['params'])} parameters, lr {group['lr']:.3g}", "current")
        params.extend(groups[key] for key in sorted(groups))
