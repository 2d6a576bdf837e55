//! The interface of `wit/0.1` as Rust types and typed functions. One made-up world names every role; a component is bound to
//! the interface of its own role only, so it needs to export no other.
#![allow(missing_docs)]

wasmtime::component::bindgen!({
    path: "../../wit/0.1",
    inline: r"
        package dray:binding;
        world every-role {
            import dray:policy/host@0.1.0;
            export dray:policy/cdq@0.1.0;
            export dray:policy/tracking@0.1.0;
            export dray:policy/copy@0.1.0;
            export dray:policy/state@0.1.0;
        }
    ",
    world: "dray:binding/every-role",
});

pub(crate) use dray::policy::host::Level;
pub(crate) use dray::policy::types::{Namespace, Setup};
pub(crate) use exports::dray::policy::{cdq, copy, state, tracking};
