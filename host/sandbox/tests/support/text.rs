//! Components of the `cdq` role made from WebAssembly text.

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// The interface as published.
pub const WIT: &str = include_str!("../../../../wit/0.1/policy.wit");

/// Encodes a core module in text form as a component of a world of `wit`.
pub fn encode(wit: &str, world: &str, core: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let package = resolve.push_str("policy.wit", wit).expect("WIT text");
    let world = resolve.select_world(&[package], Some(world)).expect("a world of it");
    let mut module = wat::parse_str(core).unwrap_or_else(|error| panic!("{error}\n{core}"));
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8, false).expect("metadata");
    let mut encoder = ComponentEncoder::default();
    encoder.validate(true).module(&module).expect("a module").encode().unwrap_or_else(|error| panic!("{error:?}"))
}

/// A drain that returns no ranges and gives everything back.
pub const HONEST: &str = "(call $answer (i32.const 0) (i32.const 0) (i32.div_u (local.get $length) (i32.const 32)))";

/// A core module of the `cdq` role: `drain` is the body of `drain` (parameters `$now $entries $length $waiting`), `more` stands
/// beside the functions.
pub fn cdq_core(drain: &str, more: &str) -> String {
    format!(
        r#"(module
  (import "dray:policy/host@0.1.0" "log" (func $log (param i32 i32 i32)))
  (memory (export "memory") 2)
  (global $top (mut i32) (i32.const 4096))
  (global $count (mut i32) (i32.const 0))
  (data (i32.const 256) "a line\n")
  (func (export "cabi_realloc") (param $old i32) (param $had i32) (param $align i32) (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $top) (i32.const 15)) (i32.const -16)))
    (global.set $top (i32.add (local.get $at) (local.get $size)))
    (local.get $at))
  ;; a `drained` at 64: list, consumed, no marks, no waits
  (func $answer (param $list i32) (param $length i32) (param $consumed i32) (result i32)
    (i32.store (i32.const 64) (local.get $list))
    (i32.store (i32.const 68) (local.get $length))
    (i32.store (i32.const 72) (local.get $consumed))
    (i64.store (i32.const 76) (i64.const 0))
    (i32.store (i32.const 84) (i32.const 0))
    (global.set $top (i32.const 4096))
    (i32.const 64))
  (func (export "dray:policy/cdq@0.1.0#open")
    (param i64 i64 i64 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
    (global.set $top (i32.const 4096))
    (i32.store8 (i32.const 16) (i32.const 0))
    (i32.const 16))
  (func $drain (export "dray:policy/cdq@0.1.0#drain")
    (param $now i64) (param $entries i32) (param $length i32) (param $waiting i32) (result i32)
    {drain})
  {more})"#
    )
}

/// The component of [`cdq_core`].
pub fn cdq(drain: &str, more: &str) -> Vec<u8> {
    encode(WIT, "cdq-policy", &cdq_core(drain, more))
}

/// A `cdq` component that keeps state: `save` hands over one byte, `load` has the body given (parameters `$bytes $length`).
pub fn with_state(load: &str) -> Vec<u8> {
    let more = format!(
        r#"(func (export "dray:policy/state@0.1.0#save") (result i32)
            (i32.store (i32.const 32) (i32.const 512)) (i32.store (i32.const 36) (i32.const 1))
            (i32.store8 (i32.const 512) (global.get $count)) (i32.const 32))
          (func (export "dray:policy/state@0.1.0#load") (param $bytes i32) (param $length i32) (result i32) {load})"#
    );
    // Each answer says how many calls there were: it gives that many entries back.
    let drain = "(global.set $count (i32.add (global.get $count) (i32.const 1)))
        (call $answer (i32.const 0) (i32.const 0) (global.get $count))";
    encode(WIT, "cdq-policy-with-state", &cdq_core(drain, &more))
}
