//! Lines into requests, answers into lines. Nothing here does I/O.

use super::{ControlError, ErrorCode, MAX_LINE, Reply, Request, VERSION};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Largest `id`: what every JSON implementation keeps exactly.
const MAX_ID: u64 = (1 << 53) - 1;

/// Bytes as they come, cut into lines.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Vec<u8>,
    too_long: bool,
}

impl Lines {
    /// Takes bytes in. What comes after a line that is too long is not kept.
    pub fn feed(&mut self, bytes: &[u8]) {
        if !self.too_long {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// The next line without its line feed; `None` until there is one.
    ///
    /// # Errors
    /// [`ErrorCode::TooLong`], from then on.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, ControlError> {
        let end = self.bytes.iter().take(MAX_LINE).position(|byte| *byte == b'\n');
        match end {
            Some(end) if !self.too_long => {
                let rest = self.bytes.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.bytes, rest);
                line.truncate(end);
                Ok(Some(line))
            }
            None if self.bytes.len() < MAX_LINE && !self.too_long => Ok(None),
            _ => {
                self.too_long = true;
                self.bytes = Vec::new();
                Err(ControlError::new(ErrorCode::TooLong, format!("a line is longer than {MAX_LINE} bytes")))
            }
        }
    }
}

/// A request with its `id`, or what is wrong with it and its `id`, if that much could be read.
///
/// # Errors
/// [`ErrorCode::BadRequest`], [`ErrorCode::Version`].
pub fn parse(line: &[u8]) -> Result<(u64, Request), (Option<u64>, ControlError)> {
    let bad = |message: String| ControlError::new(ErrorCode::BadRequest, message);
    let value: Value = serde_json::from_slice(line).map_err(|error| (None, bad(format!("the line is not JSON: {error}"))))?;
    let Value::Object(mut keys) = value else { return Err((None, bad("the line is no JSON object".into()))) };
    let id = keys.remove("id").as_ref().and_then(Value::as_u64).filter(|id| *id <= MAX_ID);
    let Some(id) = id else { return Err((None, bad("`id` is not a whole number from 0 to 2^53 - 1".into()))) };
    let wrong = |error| (Some(id), error);
    match keys.remove("v").as_ref().map(Value::as_u64) {
        Some(Some(VERSION)) => {}
        Some(Some(other)) => {
            let message = format!("version {other} of the protocol is not spoken here; write \"v\": {VERSION}");
            return Err(wrong(ControlError::new(ErrorCode::Version, message)));
        }
        _ => return Err(wrong(bad(format!("write \"v\": {VERSION}")))),
    }
    let Some(Value::String(what)) = keys.remove("do") else {
        return Err(wrong(bad("`do` is missing, or is not a string".into())));
    };
    request(&what, keys).map(|request| (id, request)).map_err(|message| wrong(bad(message)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Migrate {
    from: String,
    to: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LendCdq {
    subsystem: String,
    controller: u16,
    slots: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MediaMove {
    subsystem: String,
    nsid: u32,
    to: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceMove {
    device: String,
    controllers: Vec<u16>,
    namespaces: Vec<u32>,
    to: Vec<String>,
    state: PathBuf,
}

fn request(what: &str, keys: Map<String, Value>) -> Result<Request, String> {
    fn read<T: for<'de> Deserialize<'de>>(what: &str, keys: Map<String, Value>) -> Result<T, String> {
        T::deserialize(Value::Object(keys)).map_err(|error| format!("{what}: {error}"))
    }
    Ok(match what {
        "status" => read::<Nothing>(what, keys).map(|Nothing {}| Request::Status)?,
        "cancel" => read::<Nothing>(what, keys).map(|Nothing {}| Request::Cancel)?,
        "migrate" => read::<Migrate>(what, keys).map(|Migrate { from, to }| Request::Migrate { from, to })?,
        "lend-cdq" => {
            let LendCdq { subsystem, controller, slots } = read(what, keys)?;
            Request::LendCdq { subsystem, controller, slots }
        }
        "media-move" => {
            let MediaMove { subsystem, nsid, to } = read(what, keys)?;
            Request::MediaMove { subsystem, nsid, to }
        }
        "device-move" => {
            let DeviceMove { device, controllers, namespaces, to, state } = read(what, keys)?;
            Request::DeviceMove { device, controllers, namespaces, to, state }
        }
        other => {
            let other: String = other.chars().take(40).collect();
            return Err(format!("\"{other}\" is nothing to do; there are status, migrate, cancel, lend-cdq, media-move, device-move"));
        }
    })
}

/// A request as a line, for clients.
#[must_use]
pub fn request_line(id: u64, request: &Request) -> Vec<u8> {
    let value = match request {
        Request::Status => json!({ "do": "status" }),
        Request::Cancel => json!({ "do": "cancel" }),
        Request::Migrate { from, to } => json!({ "do": "migrate", "from": from, "to": to }),
        Request::LendCdq { subsystem, controller, slots: None } => {
            json!({ "do": "lend-cdq", "subsystem": subsystem, "controller": controller })
        }
        Request::LendCdq { subsystem, controller, slots: Some(slots) } => {
            json!({ "do": "lend-cdq", "subsystem": subsystem, "controller": controller, "slots": slots })
        }
        Request::MediaMove { subsystem, nsid, to } => {
            json!({ "do": "media-move", "subsystem": subsystem, "nsid": nsid, "to": to })
        }
        Request::DeviceMove { device, controllers, namespaces, to, state } => json!({
            "do": "device-move", "device": device, "controllers": controllers, "namespaces": namespaces, "to": to, "state": state,
        }),
    };
    line(Some(id), value)
}

/// An answer as a line. Descriptors go beside it.
#[must_use]
pub fn reply_line(id: Option<u64>, reply: &Reply) -> Vec<u8> {
    let value = match reply {
        Reply::Event(event) => json!({ "event": event }),
        Reply::Done(done, _) => json!({ "ok": done }),
        Reply::Failed(error) => json!({ "error": { "code": error.code.name(), "message": error.message } }),
    };
    line(id, value)
}

fn line(id: Option<u64>, mut value: Value) -> Vec<u8> {
    value["v"] = VERSION.into();
    value["id"] = json!(id);
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// An answer as a client reads it: the `id` (`None` = about no request) and what it says, without descriptors.
///
/// # Errors
/// In words, when the line is no answer.
pub fn parse_reply(line: &[u8]) -> Result<(Option<u64>, Reply), String> {
    let mut value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if value["v"] != VERSION {
        return Err("it speaks another version of the control protocol".into());
    }
    let id = value["id"].as_u64();
    let keys = value.as_object_mut().ok_or("no object")?;
    if let Some(event) = keys.remove("event") {
        return Ok((id, Reply::Event(event)));
    }
    if let Some(done) = keys.remove("ok") {
        return Ok((id, Reply::Done(done, Vec::new())));
    }
    let error = keys.remove("error").ok_or("neither event nor end")?;
    let name = error["code"].as_str().unwrap_or_default();
    // One that a newer appliance knows is an error all the same.
    let code = ErrorCode::ALL.into_iter().find(|code| code.name() == name).unwrap_or(ErrorCode::Failed);
    Ok((id, Reply::Failed(ControlError::new(code, error["message"].as_str().unwrap_or(name)))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &str) -> (Option<u64>, ErrorCode, String) {
        let (id, error) = parse(line.as_bytes()).expect_err(line);
        (id, error.code, error.message)
    }

    #[test]
    fn what_is_written_is_read() {
        for request in [
            Request::Status,
            Request::Cancel,
            Request::Migrate { from: "a".into(), to: "b\n\"".into() },
            Request::LendCdq { subsystem: "a".into(), controller: 2, slots: None },
            Request::LendCdq { subsystem: "a".into(), controller: 2, slots: Some(64) },
            Request::MediaMove { subsystem: "a".into(), nsid: 1, to: "x.img".into() },
            Request::DeviceMove {
                device: "d".into(),
                controllers: vec![2, 3],
                namespaces: vec![1],
                to: vec!["device:e/1".into()],
                state: "/x.state".into(),
            },
        ] {
            let line = request_line(7, &request);
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(parse(line.trim_ascii_end()), Ok((7, request)));
        }
        for code in ErrorCode::ALL {
            let line = reply_line(Some(3), &Reply::Failed(ControlError::new(code, "why")));
            let (id, reply) = parse_reply(&line).expect("an answer");
            assert!(matches!(reply, Reply::Failed(error) if id == Some(3) && error.code == code && error.message == "why"));
        }
    }

    #[test]
    fn hostile_lines_are_answered_and_not_believed() {
        let deep = format!("{}1{}", "[".repeat(2000), "]".repeat(2000));
        for line in ["", " ", "\0", "{", "[]", "1", "null", "\"x\"", "{}x", deep.as_str(), "{\"id\":1e400}"] {
            let (id, code, _) = refused(line);
            assert_eq!((id, code), (None, ErrorCode::BadRequest), "{line:.40}");
        }
        assert_eq!(parse(&[0xff, 0xfe, b'{', b'}']).expect_err("not UTF-8").1.code, ErrorCode::BadRequest);
        for id in ["-1", "1.5", "\"1\"", "null", "9007199254740992", "1e30", "{}"] {
            assert_eq!(refused(&format!("{{\"v\":1,\"id\":{id},\"do\":\"status\"}}")).0, None, "{id}");
        }
        for (line, code, words) in [
            (r#"{"v":1,"id":1}"#, ErrorCode::BadRequest, "`do`"),
            (r#"{"v":1,"id":1,"do":7}"#, ErrorCode::BadRequest, "`do`"),
            (r#"{"v":2,"id":1,"do":"status"}"#, ErrorCode::Version, "\"v\": 1"),
            (r#"{"id":1,"do":"status"}"#, ErrorCode::BadRequest, "\"v\": 1"),
            (r#"{"v":"1","id":1,"do":"status"}"#, ErrorCode::BadRequest, "\"v\": 1"),
            (r#"{"v":1,"id":1,"do":"stauts"}"#, ErrorCode::BadRequest, "stauts"),
            (r#"{"v":1,"id":1,"do":"status","from":"a"}"#, ErrorCode::BadRequest, "unknown field `from`"),
            (r#"{"v":1,"id":1,"do":"migrate","from":"a"}"#, ErrorCode::BadRequest, "missing field `to`"),
            (r#"{"v":1,"id":1,"do":"migrate","from":"a","to":1}"#, ErrorCode::BadRequest, "expected a string"),
            (r#"{"v":1,"id":1,"do":"lend-cdq","subsystem":"a","controller":70000}"#, ErrorCode::BadRequest, "70000"),
            (r#"{"v":1,"id":1,"do":"lend-cdq","subsystem":"a","controller":2,"slots":-1}"#, ErrorCode::BadRequest, "-1"),
        ] {
            let (id, got, message) = refused(line);
            assert_eq!((id, got), (Some(1), code), "{line}: {message}");
            assert!(message.contains(words), "{line}: {message}");
        }
        let long = format!(r#"{{"v":1,"id":1,"do":"{}"}}"#, "x".repeat(4000));
        assert!(refused(&long).2.len() < 200, "an answer is not longer than the question");
    }

    #[test]
    fn lines_are_cut_wherever_the_bytes_are() {
        let mut lines = Lines::default();
        for byte in b"ab\n\ncd" {
            lines.feed(&[*byte]);
        }
        assert_eq!(lines.next_line(), Ok(Some(b"ab".to_vec())));
        assert_eq!(lines.next_line(), Ok(Some(Vec::new())));
        assert_eq!(lines.next_line(), Ok(None));
        lines.feed(b"\nx");
        assert_eq!(lines.next_line(), Ok(Some(b"cd".to_vec())));
        assert_eq!(lines.next_line(), Ok(None));
    }

    #[test]
    fn a_line_is_as_long_as_it_may_be_and_no_longer() {
        let mut lines = Lines::default();
        lines.feed(&[b'x'; MAX_LINE - 1]);
        assert_eq!(lines.next_line(), Ok(None));
        lines.feed(b"\n");
        assert_eq!(lines.next_line().map(|line| line.map(|line| line.len())), Ok(Some(MAX_LINE - 1)));
        lines.feed(&[b'x'; MAX_LINE]);
        lines.feed(b"\n");
        for _ in 0..2 {
            assert_eq!(lines.next_line().expect_err("too long").code, ErrorCode::TooLong);
            lines.feed(b"{}\n");
        }
        assert_eq!(lines.bytes.capacity(), 0, "nothing more is kept");
    }
}
