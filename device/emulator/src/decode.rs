//! An entry point's text as instructions with resolved registers and branches.

use std::collections::HashMap;

use crate::{
    alu,
    error::ParseError,
    instruction::{Entry, Instruction, LOCAL, Operation, Place, Register, Source, Space, Special},
};

/// Loads from global memory.
const GLOBAL_LOADS: [&str; 10] = [
    "ld.global.u16",
    "ld.global.u32",
    "ld.global.v2.u32",
    "ld.global.v4.u32",
    "ld.global.nc.u32",
    "ld.global.nc.v4.u32",
    "ld.relaxed.sys.global.u32",
    "ld.relaxed.sys.global.u64",
    "ld.relaxed.sys.global.v2.u32",
    "ld.relaxed.sys.global.v4.u32",
];
/// Stores to it.
const GLOBAL_STORES: [&str; 6] = [
    "st.global.u32",
    "st.global.v4.u32",
    "st.relaxed.sys.global.u32",
    "st.relaxed.sys.global.v2.u32",
    "st.relaxed.sys.global.v4.u32",
    "st.release.sys.global.u32",
];

/// Types of what is loaded and stored in local memory and by generic addresses, alone or in vectors.
const PLAIN_TYPES: [&str; 9] = ["b8", "u8", "s8", "b16", "b32", "b64", "v2.b8", "v2.b16", "v2.b32"];

/// The state space of a load (`ld`) or store (`st`), one of `global` or a plain one; `None` for any other instruction.
fn space_of(name: &str, kind: &str, global: &[&str]) -> Option<Space> {
    if global.contains(&name) {
        return Some(Space::Global);
    }
    let rest = name.strip_prefix(kind)?.strip_prefix('.')?;
    let (space, of) = match rest.strip_prefix("local.") {
        Some(of) => (Space::Local, of),
        None => (Space::Generic, rest),
    };
    PLAIN_TYPES.contains(&of).then_some(space)
}

/// Decodes the body of an entry point, which starts in line `line` of its file.
pub(crate) fn entry(name: &str, line: usize, param_bytes: u64, body: &str) -> Result<Entry, ParseError> {
    let mut decoder = Decoder { line, scopes: vec![HashMap::new()], ..Decoder::default() };
    decoder.body(body)?;
    decoder.resolve()?;
    let waits_for_grid =
        decoder.code.iter().any(|instruction| matches!(instruction.operation, Operation::WaitForGrid));
    Ok(Entry {
        name: name.to_owned(),
        code: decoder.code,
        registers: decoder.registers,
        shared_bytes: decoder.shared_bytes,
        local_bytes: decoder.local_bytes as usize,
        param_bytes,
        waits_for_grid,
    })
}

/// What a name stands for.
#[derive(Clone, Copy)]
enum Name {
    Register(Register),
    /// Registers that end in a number.
    Registers {
        first: Register,
        count: usize,
    },
    /// An array in shared memory.
    Shared(u32),
    /// An array in local memory.
    Local(u32),
}

#[derive(Default)]
struct Decoder {
    line: usize,
    /// Names of the body, and of blocks of braces in it.
    scopes: Vec<HashMap<String, Name>>,
    registers: usize,
    shared_bytes: u32,
    local_bytes: u32,
    code: Vec<Instruction>,
    labels: HashMap<String, usize>,
    /// The label that came last: that of the list of labels, if one follows.
    last_label: String,
    /// Lists of labels that indexed branches choose from.
    tables: HashMap<String, Vec<String>>,
    /// Branches whose targets may come later: the instruction, and what it names.
    branches: Vec<(usize, String)>,
}

type Decoded<T> = Result<T, ParseError>;

impl Decoder {
    fn fail<T>(&self, what: impl Into<String>) -> Decoded<T> {
        Err(ParseError { line: self.line, what: what.into() })
    }

    /// Splits the text into labels, blocks and statements.
    fn body(&mut self, body: &str) -> Decoded<()> {
        let mut statement = String::new();
        let mut started = self.line;
        for line in body.lines() {
            let line_number = self.line;
            let text = line.split("//").next().unwrap_or_default();
            for character in text.chars() {
                if statement.is_empty() {
                    started = line_number;
                    match character {
                        '{' => {
                            self.scopes.push(HashMap::new());
                            continue;
                        }
                        '}' => {
                            self.scopes.pop();
                            if self.scopes.is_empty() {
                                return self.fail("a brace that closes nothing");
                            }
                            continue;
                        }
                        _ if character.is_whitespace() => continue,
                        _ => {}
                    }
                }
                match character {
                    ';' => {
                        self.line = started;
                        let statement = std::mem::take(&mut statement);
                        self.statement(statement.trim())?;
                        self.line = line_number;
                    }
                    // No instruction has a single colon.
                    ':' if statement.starts_with('$') && !statement.contains(char::is_whitespace) => {
                        let label = std::mem::take(&mut statement);
                        self.last_label.clone_from(&label);
                        self.labels.insert(label, self.code.len());
                    }
                    _ => statement.push(character),
                }
            }
            if !statement.is_empty() {
                statement.push(' ');
            }
            self.line += 1;
        }
        if statement.trim().is_empty() { Ok(()) } else { self.fail(format!("`{statement}` does not end")) }
    }

    fn statement(&mut self, statement: &str) -> Decoded<()> {
        let (guard, statement) = match statement.strip_prefix('@') {
            None => (None, statement),
            Some(guarded) => {
                let Some((predicate, rest)) = guarded.split_once(char::is_whitespace) else {
                    return self.fail(format!("`{guarded}` is only a predicate"));
                };
                let negated = predicate.starts_with('!');
                (Some((self.register(predicate.trim_start_matches('!'))?, !negated)), rest.trim())
            }
        };
        let (name, operands) = statement.split_once(char::is_whitespace).unwrap_or((statement, ""));
        let operands = split(operands);
        match name {
            ".reg" => return self.declare(&operands),
            ".shared" | ".local" => return self.declare_array(name, &operands),
            // Those of calls, which end the run.
            ".pragma" | ".param" => return Ok(()),
            ".branchtargets" => {
                let label = std::mem::take(&mut self.last_label);
                self.tables.insert(label, operands);
                return Ok(());
            }
            _ => {}
        }
        let operands: Vec<&str> = operands.iter().map(String::as_str).collect();
        let operation = self.operation(name, &operands)?;
        self.code.push(Instruction { guard, operation, line: self.line });
        Ok(())
    }

    /// `.b32 %r<5>`, or names.
    fn declare(&mut self, operands: &[String]) -> Decoded<()> {
        for operand in operands {
            let name = operand.split_whitespace().last().unwrap_or_default();
            let (name, count) = match name.split_once('<') {
                Some((name, count)) => (name, count.trim_end_matches('>').parse().ok()),
                None => (name, Some(1)),
            };
            let Some(count) = count else { return self.fail(format!("`{operand}` declares no registers")) };
            let declared = if operand.contains('<') {
                Name::Registers { first: self.registers, count }
            } else {
                Name::Register(self.registers)
            };
            self.registers += count;
            self.define(name, declared);
        }
        Ok(())
    }

    /// `.align 16 .b8 name[5]`.
    fn declare_array(&mut self, space: &str, operands: &[String]) -> Decoded<()> {
        let [operand] = operands else { return self.fail("several arrays in one declaration") };
        let array = operand.split_whitespace().last().and_then(|array| array.strip_suffix(']'));
        let Some((name, bytes)) = array.and_then(|array| array.split_once('[')) else {
            return self.fail(format!("`{operand}` is no array"));
        };
        let Ok(bytes) = bytes.parse::<u32>() else { return self.fail(format!("`{bytes}` is no length")) };
        let (end, declared): (_, fn(u32) -> Name) = match space {
            ".local" => (&mut self.local_bytes, Name::Local),
            _ => (&mut self.shared_bytes, Name::Shared),
        };
        let start = end.next_multiple_of(16);
        *end = start + bytes;
        self.define(name, declared(start));
        Ok(())
    }

    fn define(&mut self, name: &str, declared: Name) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), declared);
        }
    }

    fn find(&self, name: &str) -> Option<Name> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name)).copied()
    }

    fn register(&self, operand: &str) -> Decoded<Register> {
        if let Some(Name::Register(register)) = self.find(operand) {
            return Ok(register);
        }
        let family = operand.trim_end_matches(|character: char| character.is_ascii_digit());
        let number = operand[family.len()..].parse::<usize>().ok();
        match (self.find(family), number) {
            (Some(Name::Registers { first, count }), Some(number)) if number < count => Ok(first + number),
            _ => self.fail(format!("`{operand}` is no register")),
        }
    }

    fn source(&self, operand: &str) -> Decoded<Source> {
        match self.find(operand) {
            Some(Name::Shared(start)) => return Ok(Source::Constant(u64::from(start))),
            Some(Name::Local(start)) => return Ok(Source::Constant(LOCAL + u64::from(start))),
            _ => {}
        }
        if let Some(bits) = operand.strip_prefix("0f").or_else(|| operand.strip_prefix("0d"))
            && let Ok(bits) = u64::from_str_radix(bits, 16)
        {
            return Ok(Source::Constant(bits));
        }
        // Unsigned, as the `U` says.
        if let Some(bits) = operand.strip_prefix("0x")
            && let Ok(bits) = u64::from_str_radix(bits.trim_end_matches('U'), 16)
        {
            return Ok(Source::Constant(bits));
        }
        if let Ok(value) = operand.parse::<i128>() {
            return Ok(Source::Constant(value as u64));
        }
        Ok(Source::Register(self.register(operand)?))
    }

    /// `[address]` or `[address+8]`.
    fn place(&self, operand: &str) -> Decoded<Place> {
        let Some(inside) = operand.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) else {
            return self.fail(format!("`{operand}` is no address"));
        };
        let (address, offset) = match inside.split_once('+') {
            Some((address, offset)) => (address, offset.parse::<i64>().ok()),
            None => (inside, Some(0)),
        };
        let Some(offset) = offset else { return self.fail(format!("`{operand}` has no distance")) };
        Ok(Place { address: self.source(address.trim())?, offset: offset as u64 })
    }

    /// `{a, b}`, or one alone; `_` is none.
    fn list(operand: &str) -> Vec<&str> {
        match operand.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            Some(inside) => inside.split(',').map(str::trim).collect(),
            None => vec![operand],
        }
    }

    fn registers_of(&self, operand: &str) -> Decoded<Vec<Register>> {
        Self::list(operand).into_iter().map(|name| self.register(name)).collect()
    }

    fn sources_of(&self, operand: &str) -> Decoded<Vec<Source>> {
        Self::list(operand).into_iter().map(|name| self.source(name)).collect()
    }

    fn operation(&mut self, name: &str, operands: &[&str]) -> Decoded<Operation> {
        if let ("mov.u32" | "mov.u64", [to, from]) = (name, operands)
            && let Some(of) = special_register(from)
        {
            return Ok(Operation::Special { to: self.register(to)?, of });
        }
        if let (Some(space), [to, from]) = (space_of(name, "ld", &GLOBAL_LOADS), operands) {
            return Ok(Operation::Load {
                space,
                to: self.registers_of(to)?,
                bytes: self.bytes(name)?,
                signed: name.contains(".s8"),
                from: self.place(from)?,
                constant: name.contains(".nc"),
                is_weak: !name.contains(".relaxed"),
            });
        }
        if let (Some(space), [to, from]) = (space_of(name, "st", &GLOBAL_STORES), operands) {
            return Ok(Operation::Store {
                space,
                to: self.place(to)?,
                bytes: self.bytes(name)?,
                from: self.sources_of(from)?,
                release: name.contains(".release"),
                is_weak: !name.contains(".relaxed") && !name.contains(".release"),
            });
        }
        Ok(match (name, operands) {
            ("mov.b32" | "mov.b64", [to, from]) if to.starts_with('{') => {
                let parts = Self::list(to).into_iter();
                let parts: Vec<Option<Register>> = parts
                    .map(|part| if part == "_" { Ok(None) } else { self.register(part).map(Some) })
                    .collect::<Decoded<_>>()?;
                let [low, high] = parts[..] else { return self.fail("a value of other than two parts") };
                Operation::Unpack { to: [low, high], from: self.source(from)?, bits: half_of(name) }
            }
            ("mov.b32" | "mov.b64", [to, from]) if from.starts_with('{') => {
                let [low, high] = self.sources_of(from)?[..] else {
                    return self.fail("a value of other than two parts");
                };
                Operation::Pack { to: self.register(to)?, from: [low, high], bits: half_of(name) }
            }
            ("ld.param.b32" | "ld.param.b64", [to, from]) => {
                // There is one parameter: where in it is all that the name says.
                let inside = from.trim_start_matches('[').trim_end_matches(']');
                let offset = inside.split_once('+').map_or(Some(0), |(_, offset)| offset.parse().ok());
                let Some(offset) = offset else { return self.fail(format!("`{from}` is no parameter")) };
                let bytes = if name.ends_with("64") { 8 } else { 4 };
                Operation::LoadParameter { to: self.register(to)?, offset, bytes }
            }
            ("ld.shared.f32" | "ld.shared.v4.f32", [to, from]) => {
                Operation::LoadShared { to: self.registers_of(to)?, from: self.place(from)? }
            }
            ("st.shared.f32", [to, from]) => {
                Operation::StoreShared { to: self.place(to)?, from: self.source(from)? }
            }
            ("atom.relaxed.sys.global.cas.b32", [old, at, expected, new]) => Operation::CompareAndSwap {
                old: self.register(old)?,
                at: self.place(at)?,
                expected: self.source(expected)?,
                new: self.source(new)?,
            },
            ("bra" | "bra.uni", [label]) => {
                self.branches.push((self.code.len(), (*label).to_owned()));
                Operation::Branch { target: 0 }
            }
            ("brx.idx", [index, table]) => {
                self.branches.push((self.code.len(), (*table).to_owned()));
                Operation::BranchIndexed { index: self.source(index)?, targets: Vec::new() }
            }
            ("ret" | "exit", []) => Operation::Return,
            ("trap", []) => Operation::Fail("traps".to_owned()),
            // Functions of kernels are inlined. What is not is what panics.
            ("call" | "call.uni", operands) => {
                let function = operands.iter().find(|operand| !operand.starts_with('('));
                Operation::Fail(format!("calls {}", function.unwrap_or(&"by address")))
            }
            ("st.param.b32" | "st.param.b64", _) => Operation::Nothing,
            ("shfl.sync.bfly.b32", [to, value, distance, clamp, mask]) => Operation::Shuffle {
                to: self.register(to)?,
                value: self.source(value)?,
                distance: self.source(distance)?,
                clamp: self.source(clamp)?,
                mask: self.source(mask)?,
            },
            ("bar.warp.sync", [mask]) => Operation::SynchronizeWarp { mask: self.source(mask)? },
            ("barrier.sync", ["0"]) => Operation::Barrier,
            ("barrier.red.or.pred", [to, "0", value]) => {
                Operation::BarrierAny { to: self.register(to)?, value: self.source(value)? }
            }
            ("barrier.cluster.arrive.relaxed", []) => Operation::ArriveAtCluster,
            ("barrier.cluster.wait", []) => Operation::WaitForCluster,
            ("mbarrier.init.shared::cta.b64", [at, count]) => {
                Operation::InitializeCounter { at: self.place(at)?, count: self.source(count)? }
            }
            ("mbarrier.arrive.expect_tx.shared::cta.b64", ["_", at, bytes]) => {
                Operation::Expect { at: self.place(at)?, bytes: self.source(bytes)? }
            }
            ("mapa.shared::cluster.u32", [to, address, rank]) => Operation::Map {
                to: self.register(to)?,
                address: self.source(address)?,
                rank: self.source(rank)?,
            },
            ("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32", [to, value, counter]) => {
                Operation::Send {
                    to: self.place(to)?,
                    value: self.source(value)?,
                    counter: self.place(counter)?,
                }
            }
            ("mbarrier.try_wait.parity.shared::cta.b64", [to, at, parity]) => Operation::TryWait {
                to: self.register(to)?,
                at: self.place(at)?,
                parity: self.source(parity)?,
            },
            ("griddepcontrol.wait", []) => Operation::WaitForGrid,
            // A hint, permission for the next kernel, and an order that stores of one thread have here anyway.
            ("prefetch.global.L2", [_])
            | ("griddepcontrol.launch_dependents" | "fence.mbarrier_init.release.cluster", []) => {
                Operation::Nothing
            }
            (_, [to, from @ ..]) if from.len() <= 3 => {
                let Some(compute) = alu::compute(name) else {
                    return self.fail(format!("the emulator does not know `{name}`"));
                };
                let mut sources = [Source::Constant(0); 3];
                for (source, operand) in sources.iter_mut().zip(from) {
                    *source = self.source(operand)?;
                }
                Operation::Compute { compute, to: self.register(to)?, from: sources }
            }
            _ => return self.fail(format!("the emulator does not know `{name} {}`", operands.join(", "))),
        })
    }

    /// Bytes of each element that a load or a store moves.
    fn bytes(&self, name: &str) -> Decoded<u64> {
        let bits = name.rsplit('.').next().and_then(|kind| kind.get(1..)).and_then(|bits| bits.parse().ok());
        match bits {
            Some(bits @ (8 | 16 | 32 | 64)) => Ok(bits / 8),
            _ => self.fail(format!("`{name}` moves no number of bytes")),
        }
    }

    /// Puts in where branches go.
    fn resolve(&mut self) -> Decoded<()> {
        for (at, name) in std::mem::take(&mut self.branches) {
            self.line = self.code[at].line;
            let targets = match self.tables.get(&name) {
                Some(labels) => {
                    labels.iter().map(|label| self.target(label)).collect::<Decoded<Vec<usize>>>()?
                }
                None => vec![self.target(&name)?],
            };
            match &mut self.code[at].operation {
                Operation::Branch { target } => *target = targets[0],
                Operation::BranchIndexed { targets: to, .. } => *to = targets,
                _ => {}
            }
        }
        Ok(())
    }

    fn target(&self, label: &str) -> Decoded<usize> {
        self.labels.get(label).copied().map_or_else(|| self.fail(format!("`{label}` is no label")), Ok)
    }
}

/// Half the bits of what a `mov` moves.
fn half_of(name: &str) -> u32 {
    if name.ends_with("64") { 32 } else { 16 }
}

fn special_register(name: &str) -> Option<Special> {
    Some(match name {
        "%tid.x" => Special::Thread,
        "%ntid.x" => Special::Threads,
        "%ctaid.x" => Special::Block,
        "%nctaid.x" => Special::Blocks,
        "%cluster_ctarank" => Special::ClusterRank,
        "%cluster_nctarank" => Special::ClusterSize,
        "%clusterid.x" => Special::Cluster,
        "%nclusterid.x" => Special::Clusters,
        "%globaltimer" => Special::Nanoseconds,
        _ => return None,
    })
}

/// Operands between commas that are in no braces or brackets.
fn split(operands: &str) -> Vec<String> {
    let (mut all, mut current, mut depth) = (Vec::new(), String::new(), 0);
    for character in operands.chars() {
        match character {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            ',' if depth == 0 => {
                all.push(std::mem::take(&mut current).trim().to_owned());
                continue;
            }
            _ => {}
        }
        current.push(character);
    }
    let last = current.trim();
    if !last.is_empty() {
        all.push(last.to_owned());
    }
    all
}
