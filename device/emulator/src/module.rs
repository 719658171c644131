//! A file of PTX: its entry points, found but not yet decoded.

use std::collections::BTreeMap;

use crate::{decode, error::ParseError, instruction::Entry};

/// The text of one entry point.
#[derive(Debug)]
struct Text {
    /// The line that its body starts in, counted from 1.
    line: usize,
    param_bytes: u64,
    body: String,
}

/// A file of PTX.
#[derive(Debug)]
pub struct Module {
    entries: BTreeMap<String, Text>,
}

impl Module {
    /// Finds the entry points of `ptx`. Other functions are skipped: a call of one is a fault.
    pub fn parse(ptx: &str) -> Result<Module, ParseError> {
        let mut entries = BTreeMap::new();
        let mut lines = ptx.lines().zip(1..);
        while let Some((line, number)) = lines.next() {
            let fail = |what: &str| ParseError { line: number, what: what.to_owned() };
            let Some(name) = line.strip_prefix(".visible .entry ") else { continue };
            let name = name.trim_end_matches(['(', ' ']).to_owned();
            let mut param_bytes = None;
            let start = loop {
                let (line, number) = lines.next().ok_or_else(|| fail("an entry point without a body"))?;
                if line.trim_start().starts_with(".param ") {
                    let bytes = line.split_once('[').and_then(|(_, rest)| rest.split(']').next());
                    let bytes = bytes.and_then(|bytes| bytes.parse().ok());
                    let bytes = bytes.ok_or_else(|| fail("a parameter that is no array of bytes"))?;
                    if param_bytes.replace(bytes).is_some() {
                        return Err(fail("an entry point with more than one parameter"));
                    }
                }
                if line == "{" {
                    break number + 1;
                }
            };
            let mut body = String::new();
            for (line, _) in lines.by_ref().take_while(|(line, _)| *line != "}") {
                body.push_str(line);
                body.push('\n');
            }
            let param_bytes = param_bytes.unwrap_or(0);
            entries.insert(name, Text { line: start, param_bytes, body });
        }
        Ok(Module { entries })
    }

    /// The names of the entry points, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Decodes an entry point, if there is one of this name.
    pub fn entry(&self, name: &str) -> Option<Result<Entry, ParseError>> {
        let Text { line, param_bytes, body } = self.entries.get(name)?;
        Some(decode::entry(name, *line, *param_bytes, body))
    }
}
