"""What runners and subscribers program against: names, messages, events and their schemas; imports only ``domains``."""
