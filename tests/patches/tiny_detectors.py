"""Folders of transformers' detectors, segmenters, matting and depth networks, tiny and with random weights, as
save_pretrained writes them.
"""

import json
from pathlib import Path

import torch
import transformers as t

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . , a dog cat the red car glass lens crystal diamond bubble bulb web grid"
VOCABULARY = WORDS.split()
SIDE = 64
SQUARE = {"height": SIDE, "width": SIDE}
DECODER = {
    "hidden_size": 16,
    "mlp_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
    "attention_downsample_rate": 1,
}
PROMPTS = {"hidden_size": 16, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}


def _save(folder: Path, *parts) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def grounding_dino(folder: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    backbone = t.SwinConfig(
        image_size=SIDE,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    text = t.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = t.GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=10,
        disable_custom_kernels=True,
    )
    images = t.GroundingDinoImageProcessor(size={"shortest_edge": SIDE, "longest_edge": 96})
    processor = t.GroundingDinoProcessor(images, t.BertTokenizer(str(folder / "vocab.txt")))
    return _save(folder, t.GroundingDinoForObjectDetection(config), processor)


def sam(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [0],
        "mlp_dim": 16,
        "num_pos_feats": 8,
    }
    config = t.SamConfig(vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    images = t.SamImageProcessor(
        size={"longest_edge": SIDE},
        pad_size=SQUARE,
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    return _save(folder, t.SamModel(config), t.SamProcessor(images))


def sam2(folder: Path) -> Path:
    torch.manual_seed(0)
    backbone = t.Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[SIDE, SIDE],
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[2, 2, 2, 2],
        global_attention_blocks=[],
        window_positional_embedding_background_size=[2, 2],
    )
    vision = t.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        fpn_hidden_size=16,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        num_feature_levels=3,
    )
    config = t.Sam2Config(
        vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config={**DECODER, "iou_head_depth": 2}
    )
    images = t.Sam2ImageProcessor(size=SQUARE, mask_size={"height": 16, "width": 16})
    return _save(folder, t.Sam2Model(config), t.Sam2Processor(images, target_size=SIDE))


def sam3(folder: Path, tokenizer: Path) -> Path:
    """tokenizer: CLIP's, as ComfyUI ships it."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = t.Sam3Config(
        vision_config={
            "backbone_config": {
                **small,
                "model_type": "sam3_vit_model",
                "num_hidden_layers": 2,
                "image_size": 112,
                "pretrain_image_size": 112,
                "global_attn_indexes": [1],
                "window_size": 4,
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config={**small, "num_hidden_layers": 1, "projection_dim": 32},
        geometry_encoder_config={**small, "num_layers": 1},
        detr_encoder_config={**small, "num_layers": 1},
        detr_decoder_config={**small, "num_layers": 1, "num_queries": 6},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    images = t.Sam3ImageProcessor(size={"height": 112, "width": 112})
    words = t.CLIPTokenizer.from_pretrained(str(tokenizer), model_max_length=32)
    return _save(folder, t.Sam3Model(config), t.Sam3Processor(images, words, target_size=112))


def vitmatte(folder: Path) -> Path:
    torch.manual_seed(0)
    backbone = t.VitDetConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        pretrain_image_size=SIDE,
        patch_size=16,
        num_channels=4,
        out_indices=[1],
    )
    config = t.VitMatteConfig(
        backbone_config=backbone,
        hidden_size=16,
        convstream_hidden_sizes=[4, 8, 16],
        fusion_hidden_sizes=[16, 8, 8, 8],
    )
    return _save(folder, t.VitMatteForImageMatting(config), t.VitMatteImageProcessor())


def depth_anything(folder: Path) -> Path:
    """Its whole structure."""
    torch.manual_seed(0)
    backbone = t.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 16, 32, 32], "fusion_hidden_size": 16}
    config = t.DepthAnythingConfig(backbone_config=backbone, head_hidden_size=8, patch_size=14, **sizes)
    _save(folder, t.DepthAnythingForDepthEstimation(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 70}}))
    return folder
