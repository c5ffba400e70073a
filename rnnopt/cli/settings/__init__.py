"""The settings of the commands: said once, as typed fields; options and files come from them."""
