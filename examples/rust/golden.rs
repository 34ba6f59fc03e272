//! A golden client in Rust, standard library only: RMSNorm and SwiGLU, forward and backward, in f32.
//!
//!     rustc --edition 2021 -O -o golden golden.rs && ./golden path/to/suite
//!
//! Reads manifest.json and the safetensors files of the suite, computes every case of ops/rmsnorm and
//! ops/swiglu, and holds the results against `want` within the suite's tolerance. Exit code 0: all
//! agree; 1: something differs; 2: the suite cannot be read.

use std::collections::BTreeMap;
use std::path::{Component, Path};
use std::process::exit;

type Found<T> = Result<T, String>;

// -- JSON ----------------------------------------------------------------------------------------

#[derive(Debug)]
enum Json {
    Null,
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    const DEEPEST: usize = 64;

    fn peek(&mut self) -> Found<u8> {
        while self
            .bytes
            .get(self.at)
            .is_some_and(|b| b" \t\r\n,:".contains(b))
        {
            self.at += 1;
        }
        self.bytes
            .get(self.at)
            .copied()
            .ok_or_else(|| "JSON ends too early".to_string())
    }

    fn text(&mut self) -> Found<String> {
        if self.peek()? != b'"' {
            return Err("JSON: expected a text".into());
        }
        let mut found = Vec::new();
        loop {
            self.at += 1;
            match self.bytes.get(self.at) {
                None => return Err("JSON ends too early".into()),
                Some(b'"') => break,
                Some(b'\\') => {
                    self.at += 1; // names hold no other escapes than these
                    found.extend(self.bytes.get(self.at));
                }
                Some(byte) => found.push(*byte),
            }
        }
        self.at += 1;
        String::from_utf8(found).map_err(|_| "JSON: not UTF-8".to_string())
    }

    fn value(&mut self, depth: usize) -> Found<Json> {
        if depth > Self::DEEPEST {
            return Err("JSON: nested too deeply".into());
        }
        match self.peek()? {
            b'"' => Ok(Json::Text(self.text()?)),
            b'{' => {
                self.at += 1;
                let mut members = BTreeMap::new();
                while self.peek()? != b'}' {
                    let key = self.text()?;
                    members.insert(key, self.value(depth + 1)?);
                }
                self.at += 1;
                Ok(Json::Object(members))
            }
            b'[' => {
                self.at += 1;
                let mut items = Vec::new();
                while self.peek()? != b']' {
                    items.push(self.value(depth + 1)?);
                }
                self.at += 1;
                Ok(Json::List(items))
            }
            _ => {
                let rest = &self.bytes[self.at..];
                let length = rest
                    .iter()
                    .take_while(|b| !b" \t\r\n,:]}[{\"".contains(b))
                    .count();
                let word = std::str::from_utf8(&rest[..length]).unwrap_or("");
                self.at += length;
                match word {
                    "null" | "true" | "false" => Ok(Json::Null),
                    _ => word
                        .parse()
                        .map(Json::Number)
                        .map_err(|_| "JSON: expected a value".into()),
                }
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Found<Json> {
    Parser { bytes, at: 0 }.value(0)
}

impl Json {
    fn get(&self, key: &str) -> Found<&Json> {
        match self {
            Json::Object(members) => members.get(key).ok_or(format!("{key}: missing")),
            _ => Err(format!("{key}: expected in an object")),
        }
    }

    fn number(&self, key: &str) -> Found<f64> {
        match self.get(key)? {
            Json::Number(found) => Ok(*found),
            _ => Err(format!("{key}: expected a number")),
        }
    }

    fn text(&self, key: &str) -> Found<&str> {
        match self.get(key)? {
            Json::Text(found) => Ok(found),
            _ => Err(format!("{key}: expected a text")),
        }
    }

    fn list(&self, key: &str) -> Found<&[Json]> {
        match self.get(key)? {
            Json::List(found) => Ok(found),
            _ => Err(format!("{key}: expected a list")),
        }
    }

    /// A list of sizes or offsets, each a whole number up to `most`.
    fn sizes(&self, key: &str, most: usize) -> Found<Vec<usize>> {
        let size = |item: &Json| match item {
            Json::Number(n) if *n >= 0.0 && *n <= most as f64 && n.fract() == 0.0 => {
                Ok(*n as usize)
            }
            _ => Err(format!("{key}: found no whole number up to {most}")),
        };
        self.list(key)?.iter().map(size).collect()
    }
}

// -- safetensors ---------------------------------------------------------------------------------

/// Tensors of a file by name: shape and values, widened to f64.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

fn tensors(bytes: &[u8]) -> Found<Tensors> {
    let (length, rest) = bytes
        .split_first_chunk::<8>()
        .ok_or("not a safetensors file")?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| "truncated")?;
    let data = rest.get(length..).ok_or("truncated")?;
    let Json::Object(entries) = parse(&rest[..length])? else {
        return Err("the header is no object".into());
    };
    let mut found = Tensors::new();
    for (name, entry) in entries.iter().filter(|(name, _)| *name != "__metadata__") {
        let offsets = entry.sizes("data_offsets", data.len())?;
        let held = match offsets[..] {
            [start, stop] => data.get(start..stop).ok_or(format!("{name}: offsets"))?,
            _ => return Err(format!("{name}: expected two offsets")),
        };
        let values: Vec<f64> = match entry.text("dtype")? {
            "F64" => held
                .chunks_exact(8)
                .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            "F32" => {
                let narrow = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
                held.chunks_exact(4).map(|b| f64::from(narrow(b))).collect()
            }
            _ => continue, // integers, which these operations do not read
        };
        let shape = entry.sizes("shape", data.len())?;
        let size = shape
            .iter()
            .try_fold(1usize, |size, axis| size.checked_mul(*axis));
        if size != Some(values.len()) {
            return Err(format!("{name}: bytes and shape differ"));
        }
        found.insert(name.clone(), (shape, values));
    }
    Ok(found)
}

/// An input as f32, in which it is exact.
fn input(file: &Tensors, name: &str) -> Found<Vec<f32>> {
    let (_, values) = file
        .get(&format!("in/{name}"))
        .ok_or(format!("in/{name}: missing"))?;
    Ok(values.iter().map(|x| *x as f32).collect())
}

// -- the operations ------------------------------------------------------------------------------

type Results = Vec<(&'static str, Vec<f32>)>;

/// y = w·x/n, n = √(mean x² + eps); dx = u/n − x·mean(u·x)/n³ with u = dy·w; dw = Σ dy·x/n.
fn rmsnorm(file: &Tensors, attributes: &Json) -> Found<Results> {
    let (x, w, dy) = (input(file, "x")?, input(file, "w")?, input(file, "dy")?);
    let (c, eps) = (w.len(), attributes.number("eps")? as f32);
    if c == 0 || x.len() % c != 0 || x.len() != dy.len() {
        return Err("rmsnorm: shapes do not fit".into());
    }
    let (mut y, mut dx, mut dw) = (Vec::new(), Vec::new(), vec![0.0; c]);
    for (row, up) in x.chunks(c).zip(dy.chunks(c)) {
        let square: f32 = row.iter().map(|x| x * x).sum();
        let r = 1.0 / (square / c as f32 + eps).sqrt();
        let along: f32 = (0..c).map(|i| up[i] * w[i] * row[i]).sum::<f32>() / c as f32 * r * r * r;
        for i in 0..c {
            y.push(row[i] * r * w[i]);
            dx.push(up[i] * w[i] * r - row[i] * along);
            dw[i] += up[i] * row[i] * r;
        }
    }
    Ok(vec![("y", y), ("dx", dx), ("dw", dw)])
}

/// y = g·σ(g)·u; dgate = dy·u·(σ + g·σ·σ(−g)), dup = dy·g·σ.
fn swiglu(file: &Tensors, _: &Json) -> Found<Results> {
    let (gate, up, dy) = (input(file, "gate")?, input(file, "up")?, input(file, "dy")?);
    if gate.len() != up.len() || gate.len() != dy.len() {
        return Err("swiglu: shapes do not fit".into());
    }
    let sigmoid = |g: f32| 1.0 / (1.0 + (-g).exp());
    let all = |f: &dyn Fn(f32, f32, f32) -> f32| -> Vec<f32> {
        (0..gate.len()).map(|i| f(gate[i], up[i], dy[i])).collect()
    };
    let dgate = |g: f32, u: f32, d: f32| d * u * (sigmoid(g) + g * sigmoid(g) * sigmoid(-g));
    Ok(vec![
        ("y", all(&|g, u, _| g * sigmoid(g) * u)),
        ("dgate", all(&dgate)),
        ("dup", all(&|g, _, d| d * g * sigmoid(g))),
    ])
}

// -- the check -----------------------------------------------------------------------------------

/// Largest error as a share of the tolerance; infinite where a value is not finite.
fn margin(name: &str, got: &[f32], file: &Tensors, entry: &Json, unit: &Json) -> Found<f64> {
    let stored = |group: &str| {
        file.get(&format!("{group}/{name}"))
            .ok_or(format!("{name}: missing"))
    };
    let ((_, want), (_, mag)) = (stored("want")?, stored("mag")?);
    if want.len() != got.len() || mag.len() != got.len() {
        return Err(format!(
            "{name}: {} values, expected {}",
            got.len(),
            want.len()
        ));
    }
    let (k, s) = (entry.number("k")?, entry.number("s")?);
    let relative = s * unit.number("store")? + 4.0 * k.sqrt() * unit.number("sum")?;
    let smallest = s * unit.number("eta")?;
    let mut worst = 0.0;
    for i in 0..got.len() {
        let error = (f64::from(got[i]) - want[i]).abs();
        let allowed = relative * mag[i] + smallest;
        let share = match error {
            0.0 => 0.0,
            e if e.is_finite() && allowed > 0.0 => e / allowed,
            _ => f64::INFINITY,
        };
        worst = f64::max(worst, share);
    }
    Ok(worst)
}

/// One case: how many of its tensors agree, of how many; a line for it.
fn case(root: &Path, case: &Json, unit: &Json) -> Found<(usize, usize)> {
    let (name, file) = (case.text("name")?, Path::new(case.text("file")?));
    if !file
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        return Err(format!("{}: leads out of the suite", file.display()));
    }
    let bytes = std::fs::read(root.join(file)).map_err(|e| format!("{}: {e}", file.display()))?;
    let (held, attributes) = (tensors(&bytes)?, case.get("attributes")?);
    let results = match attributes.text("op")? {
        "rmsnorm" => rmsnorm(&held, attributes)?,
        "swiglu" => swiglu(&held, attributes)?,
        _ => return Ok((0, 0)),
    };
    let mut agree = 0;
    let mut worst: f64 = 0.0;
    for (tensor, got) in &results {
        let named = |entry: &&Json| entry.text("name") == Ok(*tensor);
        let entry = case
            .list("tensors")?
            .iter()
            .find(named)
            .ok_or(format!("{tensor}: not expected"))?;
        let share = margin(tensor, got, &held, entry, unit)?;
        agree += usize::from(share <= 1.0);
        worst = worst.max(share);
    }
    let verdict = if agree == results.len() {
        "ok  "
    } else {
        "FAIL"
    };
    println!(
        "{verdict} {} ({worst:.3} of the tolerance)",
        name.escape_debug()
    );
    Ok((agree, results.len()))
}

fn run(root: &Path) -> Found<bool> {
    let text =
        std::fs::read(root.join("manifest.json")).map_err(|e| format!("manifest.json: {e}"))?;
    let manifest = parse(&text)?;
    let unit = manifest.get("units")?.get("float32")?;
    let (mut agree, mut all) = (0, 0);
    for entry in manifest
        .list("cases")?
        .iter()
        .filter(|c| c.text("kind") == Ok("op"))
    {
        let (right, asked) = case(root, entry, unit)?;
        (agree, all) = (agree + right, all + asked);
    }
    println!("{agree} of {all} tensors agree");
    Ok(agree == all && all > 0)
}

fn main() {
    let Some(root) = std::env::args_os().nth(1) else {
        eprintln!("usage: golden path/to/suite");
        exit(2);
    };
    match run(Path::new(&root)) {
        Ok(right) => exit(i32::from(!right)),
        Err(reason) => {
            eprintln!("golden: {}", reason.escape_debug());
            exit(2);
        }
    }
}
