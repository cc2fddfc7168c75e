//! What tests of the engine with the bundled model begin and end with.

use quayline_engine::{Engine, ModelFiles, Options, Output, Tick};

/// The bundled model.
pub(crate) fn load(options: &Options) -> Engine {
    Engine::load(&ModelFiles::bundled(), options).unwrap()
}

/// Runs until nothing is left to do, with an audit after every step.
pub(crate) fn run(engine: &mut Engine) -> Vec<Output> {
    let mut outputs = Vec::new();
    while engine.has_work() {
        if !engine.can_step() {
            engine.wait_for_disk();
        }
        engine.step(Tick(0), &mut outputs);
        engine.check().unwrap();
    }
    while engine.wait_for_disk() {
        engine.check().unwrap();
    }
    outputs
}
