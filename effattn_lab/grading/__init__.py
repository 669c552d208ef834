"""Release, grade and report notebooks. Student code runs in a sandbox; nothing that it says is believed."""
