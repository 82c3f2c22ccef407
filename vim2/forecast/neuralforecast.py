"""TSM2 as a model of neuralforecast, which trains, predicts, cross-validates and saves it.

It needs neuralforecast (`pip install "vim2[neuralforecast]"`). Importing this module makes TSM2 known to
`NeuralForecast.save` and `NeuralForecast.load`.
"""

import torch
from torch import Tensor

try:
    from neuralforecast.common._base_model import BaseModel
    from neuralforecast.core import MODEL_FILENAME_DICT
    from neuralforecast.losses.pytorch import MAE
except ImportError as error:
    raise ImportError(f'This needs neuralforecast: pip install "vim2[neuralforecast]" ({error}).') from None

from .. import tsm2

__all__ = ["TSM2"]


class TSM2(BaseModel):
    """TSM2 for all series of a neuralforecast data frame at once.

    Historical exogenous columns become further variates, whose forecasts are dropped; future ones are read over
    lookback and horizon, static ones once. Point losses and quantile losses (MQLoss) are supported, distributions are
    not.

    Args:
        h: Horizon.
        input_size: Lookback; -1 for three horizons.
        n_series: Number of series in the data frame.
        patch, stride, d_model, depth, d_state, expand, d_conv, time_mixer, variate_mixer, norm, instance_norm, dropout,
            head_dropout: As in `vim2.TSM2Config`; patches are shortened to the lookback.
        Others: As in neuralforecast's own multivariate models, such as TSMixerx; categorical columns are taken too.

    Raises:
        ValueError: A loss of another kind, or options that do not fit together.
    """

    EXOGENOUS_FUTR = True
    EXOGENOUS_HIST = True
    EXOGENOUS_STAT = True
    EXOGENOUS_CAT = True
    MULTIVARIATE = True
    RECURRENT = False

    def __init__(
        self,
        h,
        input_size,
        n_series,
        futr_exog_list=None,
        hist_exog_list=None,
        stat_exog_list=None,
        patch: int = 16,
        stride: int = 8,
        d_model: int = 16,
        depth: int = 1,
        d_state: int = 16,
        expand: float = 2.0,
        d_conv: int = 4,
        time_mixer: str = "s6",
        variate_mixer: str = "s6",
        norm: str = "layer",
        instance_norm: str = "mean",
        dropout: float = 0.1,
        head_dropout: float = 0.0,
        loss=MAE(),  # noqa: B008 - as in neuralforecast's own models, which it reads from the signature
        valid_loss=None,
        max_steps: int = 1000,
        learning_rate: float = 1e-3,
        num_lr_decays: int = -1,
        early_stop_patience_steps: int = -1,
        val_check_steps: int = 100,
        batch_size: int = 32,
        valid_batch_size: int | None = None,
        windows_batch_size: int = 32,
        inference_windows_batch_size: int = 32,
        start_padding_enabled: bool = False,
        step_size: int = 1,
        scaler_type: str = "identity",
        random_seed: int = 1,
        drop_last_loader: bool = False,
        alias: str | None = None,
        optimizer=None,
        optimizer_kwargs=None,
        lr_scheduler=None,
        lr_scheduler_kwargs=None,
        dataloader_kwargs=None,
        **trainer_kwargs,
    ):
        super().__init__(
            h=h,
            input_size=input_size,
            n_series=n_series,
            futr_exog_list=futr_exog_list,
            hist_exog_list=hist_exog_list,
            stat_exog_list=stat_exog_list,
            loss=loss,
            valid_loss=valid_loss,
            max_steps=max_steps,
            learning_rate=learning_rate,
            num_lr_decays=num_lr_decays,
            early_stop_patience_steps=early_stop_patience_steps,
            val_check_steps=val_check_steps,
            batch_size=batch_size,
            valid_batch_size=valid_batch_size,
            windows_batch_size=windows_batch_size,
            inference_windows_batch_size=inference_windows_batch_size,
            start_padding_enabled=start_padding_enabled,
            step_size=step_size,
            scaler_type=scaler_type,
            random_seed=random_seed,
            drop_last_loader=drop_last_loader,
            alias=alias,
            optimizer=optimizer,
            optimizer_kwargs=optimizer_kwargs,
            lr_scheduler=lr_scheduler,
            lr_scheduler_kwargs=lr_scheduler_kwargs,
            dataloader_kwargs=dataloader_kwargs,
            **trainer_kwargs,
        )
        quantiles = ()
        if self.loss.outputsize_multiplier > 1:
            if self.loss.is_distribution_output or not hasattr(self.loss, "quantiles"):
                raise ValueError(
                    f"TSM2 forecasts values or quantiles, not what {type(self.loss).__name__} needs: use a point loss "
                    "such as MAE or MSE, or MQLoss."
                )
            # neuralforecast puts the median first, TSM2's quantiles ascend
            levels, order = self.loss.quantiles.detach().sort()
            quantiles = tuple(round(level, 6) for level in levels.tolist())
            self.register_buffer("order", order.argsort(), persistent=False)
        patch = min(patch, self.input_size)
        self.model = tsm2.TSM2(
            tsm2.TSM2Config(
                lookback=self.input_size,
                horizon=h,
                patch=patch,
                stride=min(stride, patch),
                d_model=d_model,
                depth=depth,
                d_state=d_state,
                expand=expand,
                d_conv=d_conv,
                time_mixer=time_mixer,
                variate_mixer=variate_mixer,
                norm=norm,
                instance_norm=instance_norm,
                dropout=dropout,
                head_dropout=head_dropout,
                quantiles=quantiles,
                static_features=self.stat_exog_size,
                future_features=self.futr_exog_size,
                future_length=self.input_size + h,
            )
        )

    def forward(self, windows_batch) -> Tensor:
        """A dictionary with insample_y (B, L, N), hist_exog (B, X, L, N), futr_exog (B, F, L + h, N) and stat_exog
        (N, S) -> (B, h, N), with quantiles (B, h, N * Q)."""
        x, static, future = windows_batch["insample_y"], None, None
        each = 1 + self.hist_exog_size  # variates a series: itself, then its historical exogenous columns
        if self.hist_exog_size:
            history = torch.cat((x.unsqueeze(1), windows_batch["hist_exog"]), dim=1)
            x = history.permute(0, 2, 3, 1).flatten(2)
        if self.stat_exog_size:
            static = windows_batch["stat_exog"].repeat_interleave(each, dim=0)
        if self.futr_exog_size:
            future = windows_batch["futr_exog"].permute(0, 2, 3, 1).repeat_interleave(each, dim=2)
        y = self.model(x, static, future)[:, :, ::each]
        return y if y.dim() == 3 else y[..., self.order].flatten(2)


MODEL_FILENAME_DICT.setdefault("tsm2", TSM2)  # read by NeuralForecast.save and .load
