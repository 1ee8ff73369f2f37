"""A package, so that pytest puts the folder above on the path: from this one, `import peft` would find a folder."""
