"""The transparent decoder as it was published, of diffusers' blocks."""

from strata.networks.transparency import LATENT_BLOCK
from torch import nn


class Reference(nn.Module):
    """LayerDiffuse's decoder put together from the blocks of diffusers that it was published with."""

    def __init__(self, widths, attention_levels):
        super().__init__()
        from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block

        levels, common = (
            len(widths),
            {
                "resnet_eps": 1e-5,
                "resnet_act_fn": "silu",
                "resnet_groups": 4,
                "attention_head_dim": 8,
                "temb_channels": None,
            },
        )
        self.conv_in, self.latent_conv_in = nn.Conv2d(3, widths[0], 3, padding=1), nn.Conv2d(4, widths[2], 1)
        down = [
            get_down_block(
                "AttnDownBlock2D" if i >= levels - attention_levels else "DownBlock2D",
                num_layers=2,
                in_channels=widths[max(i - 1, 0)],
                out_channels=width,
                add_downsample=i < levels - 1,
                downsample_padding=1,
                resnet_time_scale_shift="default",
                **common,
            )
            for i, width in enumerate(widths)
        ]
        self.down_blocks = nn.ModuleList(down)
        self.mid_block = UNetMidBlock2D(
            in_channels=widths[-1],
            temb_channels=None,
            resnet_eps=1e-5,
            resnet_groups=4,
            attention_head_dim=8,
            add_attention=True,
        )
        back = list(reversed(widths))
        up = [
            get_up_block(
                "AttnUpBlock2D" if i < attention_levels else "UpBlock2D",
                num_layers=3,
                in_channels=back[min(i + 1, levels - 1)],
                out_channels=width,
                prev_output_channel=back[max(i - 1, 0)],
                add_upsample=i < levels - 1,
                resnet_time_scale_shift="default",
                **common,
            )
            for i, width in enumerate(back)
        ]
        self.up_blocks = nn.ModuleList(up)
        self.conv_norm_out, self.conv_out = nn.GroupNorm(4, widths[0], eps=1e-5), nn.Conv2d(widths[0], 4, 3, padding=1)

    def forward(self, image, latent):
        x = self.conv_in(image)
        kept = (x,)
        for i, block in enumerate(self.down_blocks):
            if i == LATENT_BLOCK:
                x = x + self.latent_conv_in(latent)
            x, more = block(hidden_states=x, temb=None)
            kept += more
        x = self.mid_block(x, None)
        for block in self.up_blocks:
            count = len(block.resnets)
            kept, taken = kept[:-count], kept[-count:]
            x = block(x, taken, None)
        return self.conv_out(nn.functional.silu(self.conv_norm_out(x)))
