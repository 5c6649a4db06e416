"""Names of published folders to those of the single files, written down block by block (none is computed from another).

Blocks are those of networks with two residual blocks a level, as SD-1.5 and SDXL have.
"""

SD15_BLOCKS = """
conv_in                         input_blocks.0.0
down_blocks.0.resnets.0         input_blocks.1.0
down_blocks.0.attentions.0      input_blocks.1.1
down_blocks.0.resnets.1         input_blocks.2.0
down_blocks.0.attentions.1      input_blocks.2.1
down_blocks.0.downsamplers.0    input_blocks.3.0
down_blocks.1.resnets.0         input_blocks.4.0
down_blocks.1.attentions.0      input_blocks.4.1
down_blocks.1.resnets.1         input_blocks.5.0
down_blocks.1.attentions.1      input_blocks.5.1
down_blocks.1.downsamplers.0    input_blocks.6.0
down_blocks.2.resnets.0         input_blocks.7.0
down_blocks.2.attentions.0      input_blocks.7.1
down_blocks.2.resnets.1         input_blocks.8.0
down_blocks.2.attentions.1      input_blocks.8.1
down_blocks.2.downsamplers.0    input_blocks.9.0
down_blocks.3.resnets.0         input_blocks.10.0
down_blocks.3.resnets.1         input_blocks.11.0
mid_block.resnets.0             middle_block.0
mid_block.attentions.0          middle_block.1
mid_block.resnets.1             middle_block.2
up_blocks.0.resnets.0           output_blocks.0.0
up_blocks.0.resnets.1           output_blocks.1.0
up_blocks.0.resnets.2           output_blocks.2.0
up_blocks.0.upsamplers.0        output_blocks.2.1
up_blocks.1.resnets.0           output_blocks.3.0
up_blocks.1.attentions.0        output_blocks.3.1
up_blocks.1.resnets.1           output_blocks.4.0
up_blocks.1.attentions.1        output_blocks.4.1
up_blocks.1.resnets.2           output_blocks.5.0
up_blocks.1.attentions.2        output_blocks.5.1
up_blocks.1.upsamplers.0        output_blocks.5.2
up_blocks.2.resnets.0           output_blocks.6.0
up_blocks.2.attentions.0        output_blocks.6.1
up_blocks.2.resnets.1           output_blocks.7.0
up_blocks.2.attentions.1        output_blocks.7.1
up_blocks.2.resnets.2           output_blocks.8.0
up_blocks.2.attentions.2        output_blocks.8.1
up_blocks.2.upsamplers.0        output_blocks.8.2
up_blocks.3.resnets.0           output_blocks.9.0
up_blocks.3.attentions.0        output_blocks.9.1
up_blocks.3.resnets.1           output_blocks.10.0
up_blocks.3.attentions.1        output_blocks.10.1
up_blocks.3.resnets.2           output_blocks.11.0
up_blocks.3.attentions.2        output_blocks.11.1
conv_norm_out                   out.0
conv_out                        out.2
time_embedding.linear_1         time_embed.0
time_embedding.linear_2         time_embed.2
"""

SDXL_BLOCKS = """
conv_in                         input_blocks.0.0
down_blocks.0.resnets.0         input_blocks.1.0
down_blocks.0.resnets.1         input_blocks.2.0
down_blocks.0.downsamplers.0    input_blocks.3.0
down_blocks.1.resnets.0         input_blocks.4.0
down_blocks.1.attentions.0      input_blocks.4.1
down_blocks.1.resnets.1         input_blocks.5.0
down_blocks.1.attentions.1      input_blocks.5.1
down_blocks.1.downsamplers.0    input_blocks.6.0
down_blocks.2.resnets.0         input_blocks.7.0
down_blocks.2.attentions.0      input_blocks.7.1
down_blocks.2.resnets.1         input_blocks.8.0
down_blocks.2.attentions.1      input_blocks.8.1
mid_block.resnets.0             middle_block.0
mid_block.attentions.0          middle_block.1
mid_block.resnets.1             middle_block.2
up_blocks.0.resnets.0           output_blocks.0.0
up_blocks.0.attentions.0        output_blocks.0.1
up_blocks.0.resnets.1           output_blocks.1.0
up_blocks.0.attentions.1        output_blocks.1.1
up_blocks.0.resnets.2           output_blocks.2.0
up_blocks.0.attentions.2        output_blocks.2.1
up_blocks.0.upsamplers.0        output_blocks.2.2
up_blocks.1.resnets.0           output_blocks.3.0
up_blocks.1.attentions.0        output_blocks.3.1
up_blocks.1.resnets.1           output_blocks.4.0
up_blocks.1.attentions.1        output_blocks.4.1
up_blocks.1.resnets.2           output_blocks.5.0
up_blocks.1.attentions.2        output_blocks.5.1
up_blocks.1.upsamplers.0        output_blocks.5.2
up_blocks.2.resnets.0           output_blocks.6.0
up_blocks.2.resnets.1           output_blocks.7.0
up_blocks.2.resnets.2           output_blocks.8.0
conv_norm_out                   out.0
conv_out                        out.2
time_embedding.linear_1         time_embed.0
time_embedding.linear_2         time_embed.2
add_embedding.linear_1          label_emb.0.0
add_embedding.linear_2          label_emb.0.2
"""

# Inside a block of the UNet. What stands in a transformer has the same name in both.
UNET_LAYERS = """
norm1            in_layers.0
conv1            in_layers.2
time_emb_proj    emb_layers.1
norm2            out_layers.0
conv2            out_layers.3
conv_shortcut    skip_connection
"""
DOWNSAMPLER, UPSAMPLER = "conv op", "conv conv"

VAE_BLOCKS = """
encoder.conv_in                         encoder.conv_in
encoder.down_blocks.0.resnets.0         encoder.down.0.block.0
encoder.down_blocks.0.resnets.1         encoder.down.0.block.1
encoder.down_blocks.0.downsamplers.0    encoder.down.0.downsample
encoder.down_blocks.1.resnets.0         encoder.down.1.block.0
encoder.down_blocks.1.resnets.1         encoder.down.1.block.1
encoder.down_blocks.1.downsamplers.0    encoder.down.1.downsample
encoder.down_blocks.2.resnets.0         encoder.down.2.block.0
encoder.down_blocks.2.resnets.1         encoder.down.2.block.1
encoder.down_blocks.2.downsamplers.0    encoder.down.2.downsample
encoder.down_blocks.3.resnets.0         encoder.down.3.block.0
encoder.down_blocks.3.resnets.1         encoder.down.3.block.1
encoder.mid_block.resnets.0             encoder.mid.block_1
encoder.mid_block.attentions.0          encoder.mid.attn_1
encoder.mid_block.resnets.1             encoder.mid.block_2
encoder.conv_norm_out                   encoder.norm_out
encoder.conv_out                        encoder.conv_out
quant_conv                              quant_conv
post_quant_conv                         post_quant_conv
decoder.conv_in                         decoder.conv_in
decoder.mid_block.resnets.0             decoder.mid.block_1
decoder.mid_block.attentions.0          decoder.mid.attn_1
decoder.mid_block.resnets.1             decoder.mid.block_2
decoder.up_blocks.0.resnets.0           decoder.up.3.block.0
decoder.up_blocks.0.resnets.1           decoder.up.3.block.1
decoder.up_blocks.0.resnets.2           decoder.up.3.block.2
decoder.up_blocks.0.upsamplers.0        decoder.up.3.upsample
decoder.up_blocks.1.resnets.0           decoder.up.2.block.0
decoder.up_blocks.1.resnets.1           decoder.up.2.block.1
decoder.up_blocks.1.resnets.2           decoder.up.2.block.2
decoder.up_blocks.1.upsamplers.0        decoder.up.2.upsample
decoder.up_blocks.2.resnets.0           decoder.up.1.block.0
decoder.up_blocks.2.resnets.1           decoder.up.1.block.1
decoder.up_blocks.2.resnets.2           decoder.up.1.block.2
decoder.up_blocks.2.upsamplers.0        decoder.up.1.upsample
decoder.up_blocks.3.resnets.0           decoder.up.0.block.0
decoder.up_blocks.3.resnets.1           decoder.up.0.block.1
decoder.up_blocks.3.resnets.2           decoder.up.0.block.2
decoder.conv_norm_out                   decoder.norm_out
decoder.conv_out                        decoder.conv_out
"""
VAE_LAYERS = """
norm1            norm1
conv1            conv1
norm2            norm2
conv2            conv2
conv_shortcut    nin_shortcut
conv             conv
group_norm       norm
to_q             q
to_k             k
to_v             v
to_out.0         proj_out
query            q
key              k
value            v
proj_attn        proj_out
"""

OPEN_CLIP_LAYERS = """
layer_norm1           ln_1
layer_norm2           ln_2
self_attn.out_proj    attn.out_proj
mlp.fc1               mlp.c_fc
mlp.fc2               mlp.c_proj
"""


def table(text: str) -> dict[str, str]:
    """Returns the pairs of a text with one on each line."""
    return dict(line.split() for line in text.strip().splitlines())
