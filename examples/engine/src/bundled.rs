//! The small model that is part of the program.

use crate::files::ModelFiles;

static FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../bundled/config.json")),
    ("generation_config.json", include_bytes!("../bundled/generation_config.json")),
    ("tokenizer.json", include_bytes!("../bundled/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../bundled/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../bundled/model.safetensors")),
];

impl ModelFiles {
    /// The model inside the program: a small Llama that has read Shakespeare.
    #[must_use]
    pub fn bundled() -> Self {
        Self::from_memory("quayline-tiny", FILES)
    }
}
