"""Callbacks for TRL's trainers that go with peft_mora's adapters."""
