//! The elementwise chains between matrix products and the optimizer's step, each as one pass over memory.
//!
//! Every kernel is compared with its plain-tensor form in its own tests. Arithmetic is f32, whatever the storage;
//! results do not depend on the number of threads.

pub mod attention;
pub mod cached_attention;
pub mod cuda;
pub mod distribution;
pub mod moment;
pub mod optimizer;
pub mod product;
pub mod reduce;
pub mod rms_norm;
pub mod rotary;
pub mod softmax;
pub mod swiglu;

mod real;
