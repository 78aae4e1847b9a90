"""What Hugging Face's Trainer needs in order to save our models as it saves its own."""

import functools
import sys


def save_configuration_too(model_class: type) -> None:
    """Makes Trainer write config.json beside the weights of a model of `model_class`, in every folder that it saves.

    Trainer does so for its own classes alone, of any other module it writes the weights only, and it offers no place to
    hook in there: callbacks are not told of save_model. So its one method that writes files is wrapped, once, where
    transformers' Trainer has been imported; for all other models it stays what it was.
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or hasattr(trainer._save, "__wrapped__"):
        return
    save = trainer._save

    @functools.wraps(save)
    def _save(self, output_dir=None, state_dict=None):
        save(self, output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, model_class) and self.args.should_save:
            model.save_config(self.args.output_dir if output_dir is None else output_dir)

    trainer._save = _save
