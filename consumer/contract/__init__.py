"""The interface for runners and subscribers: names, messages, events and their schemas; imports only ``domains``."""
