//! The accuracy of formats that a sum over ranks could be exchanged in: the table that `core::wire` was chosen by.
//!
//! `cargo run --release -p fused-collective-core --example wire_formats`
//!
//! Each figure is the error of the sum relative to the row's root mean square: root mean square / largest, in percent.

use fused_collective_core::{
    quant::{e2m1, e4m3, ue8m0},
    wire::{BLOCK, WireFormat},
};

const HIDDEN: usize = 8192;
const ROWS: usize = 24;

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ bits >> 31) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller's.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[derive(Clone, Copy)]
enum Rows {
    Normal,
    /// Student's t of 3 degrees of freedom.
    HeavyTailed,
    /// Normal; one element of 512 times 50.
    Outliers,
}

impl Rows {
    fn element(self, random: &mut Random) -> f32 {
        let normal = random.normal();
        (match self {
            Rows::Normal => normal,
            Rows::HeavyTailed => {
                let squares: f64 = (0..3).map(|_| random.normal().powi(2)).sum();
                normal / (squares / 3.0).sqrt()
            }
            Rows::Outliers if random.uniform() < 1.0 / 512.0 => 50.0 * normal,
            Rows::Outliers => normal,
        }) as f32
    }
}

/// The codes of a block, as multiples of its scale.
#[derive(Clone, Copy)]
enum Codes {
    /// Whole numbers of at most this magnitude; the largest element of a block is half a step above it.
    Int(f32),
    /// Whole numbers from `-LIMIT` to `LIMIT - 1`, the element of largest magnitude being `-LIMIT`.
    SignedScale(f32),
    /// Halves of odd numbers of at most this magnitude: no zero.
    Halves(f32),
    E4M3,
    E2M1,
    /// A format of the library, with its own block and scale.
    Kept(WireFormat),
}

#[derive(Clone, Copy)]
enum Scale {
    Ue8m0,
    Bf16,
    /// `f32` without its sign and its 15 last bits.
    Ue8m8,
    F16,
    F32,
}

impl Scale {
    const ALL: [Scale; 5] = [Scale::Ue8m0, Scale::Bf16, Scale::Ue8m8, Scale::F16, Scale::F32];

    fn name(self) -> (&'static str, f64) {
        match self {
            Scale::Ue8m0 => ("ue8m0", 1.0),
            Scale::Bf16 => ("bf16", 2.0),
            Scale::Ue8m8 => ("ue8m8", 2.0),
            Scale::F16 => ("f16", 2.0),
            Scale::F32 => ("f32", 4.0),
        }
    }

    /// Rounds up.
    fn round(self, scale: f32) -> f32 {
        let up = |bits: u32| f32::from_bits((scale.to_bits() + (1 << bits) - 1) >> bits << bits);
        match self {
            Scale::Ue8m0 => ue8m0::decode(ue8m0::encode_up(scale)),
            Scale::Bf16 => up(16),
            Scale::Ue8m8 => up(15),
            Scale::F16 => up(13),
            Scale::F32 => scale,
        }
    }
}

impl Codes {
    fn name(self) -> (&'static str, f64) {
        match self {
            Codes::Int(limit) if limit > 7.0 => ("int8", 8.0),
            Codes::Int(_) => ("int4", 4.0),
            Codes::SignedScale(limit) if limit > 8.0 => ("int8, signed scale", 8.0),
            Codes::SignedScale(_) => ("int4, signed scale", 4.0),
            Codes::Halves(_) => ("int4, halves", 4.0),
            Codes::E4M3 => ("e4m3", 8.0),
            Codes::E2M1 => ("e2m1", 4.0),
            Codes::Kept(format) => (format.name(), format.bits().into()),
        }
    }

    fn round(self, block: &mut [f32], scale: Scale) {
        if let Codes::Kept(format) = self {
            let mut row = vec![0; format.row_bytes(block.len() as u64) as usize];
            format.encode(block, &mut row);
            block.fill(0.0);
            return format.add(&row, block);
        }
        let extreme = block.iter().fold(0.0f32, |most, x| if x.abs() > most.abs() { *x } else { most });
        let largest = match self {
            Codes::Int(limit) => limit + 0.499_999,
            Codes::SignedScale(limit) | Codes::Halves(limit) => limit,
            Codes::E4M3 => e4m3::MAX,
            Codes::E2M1 => e2m1::MAX,
            Codes::Kept(_) => unreachable!("returned before"),
        };
        let unit = scale.round(extreme.abs() / largest).max(f32::MIN_POSITIVE);
        for x in block {
            let value = *x / unit;
            *x = unit
                * match self {
                    Codes::Int(limit) => value.round_ties_even().clamp(-limit, limit),
                    Codes::SignedScale(limit) => {
                        let flip = -extreme.signum();
                        flip * (flip * value).round_ties_even().clamp(-limit, limit - 1.0)
                    }
                    Codes::Halves(limit) => (value.floor() + 0.5).clamp(-limit, limit),
                    Codes::E4M3 => e4m3::decode(e4m3::encode(value)),
                    Codes::E2M1 => e2m1::decode(e2m1::encode(value)),
                    Codes::Kept(_) => unreachable!("returned before"),
                };
        }
    }
}

/// Root mean square and largest error of the sum of `ranks` rows, in percent of its root mean square, in one-shot and two-shot.
fn errors(codes: Codes, scale: Scale, block: usize, rows: Rows, ranks: usize) -> [[f64; 2]; 2] {
    let mut random = Random(1);
    let mut figures = [[0.0f64; 2]; 2];
    for _ in 0..ROWS {
        let mut exact = vec![0.0f64; HIDDEN];
        let mut sum = vec![0.0f32; HIDDEN];
        for _ in 0..ranks {
            let mut row: Vec<f32> = (0..HIDDEN).map(|_| rows.element(&mut random)).collect();
            exact.iter_mut().zip(&row).for_each(|(sum, x)| *sum += f64::from(*x));
            row.chunks_mut(block).for_each(|block| codes.round(block, scale));
            sum.iter_mut().zip(&row).for_each(|(sum, x)| *sum += x);
        }
        let mean = |squares: f64| (squares / HIDDEN as f64).sqrt();
        let rms = mean(exact.iter().map(|x| x * x).sum());
        for [mean_error, largest] in &mut figures {
            let errors = || exact.iter().zip(&sum).map(|(exact, x)| (exact - f64::from(*x)).abs());
            *mean_error += 100.0 * mean(errors().map(|x| x * x).sum()) / rms / ROWS as f64;
            *largest = largest.max(100.0 * errors().fold(0.0, f64::max) / rms);
            sum.chunks_mut(block).for_each(|block| codes.round(block, scale));
        }
    }
    figures
}

fn main() {
    println!(
        "| codes | block | scale | bits | rows | 2 one-shot | two-shot | 4 one-shot | two-shot | 8 one-shot | two-shot |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let kinds = [
        Codes::Int(127.0),
        Codes::SignedScale(128.0),
        Codes::E4M3,
        Codes::Int(7.0),
        Codes::SignedScale(8.0),
        Codes::Halves(7.5),
        Codes::E2M1,
    ];
    for codes in kinds {
        for (block, scale) in [16, 32].into_iter().flat_map(|block| Scale::ALL.map(|scale| (block, scale))) {
            print(codes, block, scale);
        }
    }
    println!("| **kept** | | | | | | | | | | |");
    for format in WireFormat::ALL {
        print(Codes::Kept(format), BLOCK, Scale::Bf16);
    }
}

fn print(codes: Codes, block: usize, scale: Scale) {
    let ((name, bits), (scale_name, scale_bytes)) = (codes.name(), scale.name());
    let bits = bits + 8.0 * scale_bytes / block as f64;
    for (rows, rows_name) in
        [(Rows::Normal, "normal"), (Rows::HeavyTailed, "t(3)"), (Rows::Outliers, "outliers")]
    {
        print!("| {name} | {block} | {scale_name} | {bits:.2} | {rows_name} |");
        for figures in [2, 4, 8].map(|ranks| errors(codes, scale, block, rows, ranks)) {
            for [mean, largest] in figures {
                print!(" {mean:.3} / {largest:.1} |");
            }
        }
        println!();
    }
}
