"""DeepSpeed's ZeRO-3: deepspeed examples/trainers/deepspeed_zero3.py [MODEL [DATASET with a column "text"]]"""

import sys

import hf_trainer

ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": "auto",  # layers run fused whatever it is
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def main(*arguments, **settings):
    """hf_trainer's callback is the one line."""
    return hf_trainer.main(*arguments, **{"output_dir": "outputs/deepspeed_zero3", "deepspeed": ZERO_3, **settings})


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
