"""From delivery to settlement: worker, intake and settler; imports ``closeout``, ``parked`` and below."""
